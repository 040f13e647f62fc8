"""Pack scenes into WebDataset shards with an index, a vocabulary, a manifest and a list of rejections.

    DIR/train-000000.tar ...  KEY.jpg (the source file's bytes), KEY.json (see `scene.scene_to_json`)
    DIR/index.bin             see `index`
    DIR/views.bin             see `views_file`
    DIR/vocabulary.bin        see `vocabulary_file`
    DIR/manifest.json         counts, and the SHA-256 of every other file
    DIR/rejected.jsonl        {"entry", "reason", "detail"} per line
    DIR/source.json           fingerprint of the source and options, to detect an up-to-date pack; only for data sets on
                              disk

The output bytes depend only on the scenes, not on the number of processes or on interruptions (see `staging`). Only the
keys, a million distinct texts and the open shards are kept in memory.
"""
