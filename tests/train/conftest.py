from training_runs import fork_server, shards, small  # noqa: F401
