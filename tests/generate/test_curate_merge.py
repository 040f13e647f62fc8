from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scenarioclip_fast.errors import UserError
from scenarioclip_fast.generate.curate import merge as module
from scenarioclip_fast.generate.curate.merge import Embedder, merge_embeddings, merge_texts

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "running", "jogging", "eating", "food", "a"]


def angles(*degrees: float) -> np.ndarray:
    return np.stack([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], 1)


def brute_force(texts: Sequence[str], counts: Sequence[int], vectors: np.ndarray, threshold: float) -> dict[str, str]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen: list[int] = []
    found = {}
    for i in sorted(range(len(texts)), key=lambda i: (-counts[i], texts[i])):
        similar = [float(unit[i] @ unit[j]) for j in chosen]
        if similar and max(similar) >= threshold:
            found[texts[i]] = texts[chosen[int(np.argmax(similar))]]
        else:
            chosen.append(i)
    return found


def test_texts_join_the_most_similar_representative() -> None:
    texts, counts = ["run", "jog", "dash", "eat"], [5, 9, 1, 5]
    # cos 20 = .94, cos 35 = .82, cos 15 = .97: "dash" is similar to "run", which has joined "jog" already.
    assert merge_embeddings(texts, counts, angles(20, 0, 35, 90), 0.9) == {"run": "jog"}
    assert merge_embeddings(texts, counts, angles(20, 0, 35, 90), 0.8) == {"run": "jog", "dash": "jog"}
    # Two representatives: the nearer one counts, not the more frequent one.
    assert merge_embeddings(texts, [5, 9, 1, 7], angles(50, 0, 30, 90), 0.75) == {"run": "eat", "dash": "jog"}


def test_ties_are_broken_by_text() -> None:
    assert merge_embeddings(["b", "a", "c"], [1, 1, 1], angles(0, 1, 2), 0.9) == {"b": "a", "c": "a"}


def test_vectors_need_not_have_length_1_but_zeros_are_similar_to_none() -> None:
    vectors = angles(0, 5, 0) * np.array([[7.0], [0.01], [0.0]])
    assert merge_embeddings(["a", "b", "c"], [3, 2, 1], vectors, 0.9) == {"b": "a"}
    assert merge_embeddings([], [], np.zeros((0, 4)), 0.9) == {}
    with pytest.raises(ValueError, match="got 1 texts, 1 counts and 2 vectors"):
        merge_embeddings(["a"], [1], np.zeros((2, 4)), 0.9)


@given(st.integers(1, 60), st.integers(0, 1000), st.sampled_from([0.3, 0.6, 0.9]), st.sampled_from([1, 3, 7, 1024]))
def test_blocks_do_not_change_the_result(n: int, seed: int, threshold: float, block: int) -> None:
    generator = np.random.default_rng(seed)
    texts = [f"t{i}" for i in generator.permutation(n)]
    counts = [int(v) for v in generator.integers(1, 5, n)]
    vectors = generator.standard_normal((n, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        found = merge_embeddings(texts, counts, vectors, threshold)
    assert found == brute_force(texts, counts, vectors, threshold)
    assert not set(found.values()) & set(found)  # representatives stay


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).eval().save_pretrained(folder)
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_embeddings_are_means_over_the_tokens_of_a_text(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(module, "_BATCH", 2)  # with padding
    texts = ["running", "eating a food", "jogging a", "running"]
    vectors = Embedder(str(encoder))(texts)
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states.mean(0), dim=0)
        # Padding changes the order of sums: rounding of float32.
        torch.testing.assert_close(torch.from_numpy(vector.copy()), expected, atol=1e-5, rtol=0)
    assert np.array_equal(vectors[0], vectors[3])


def test_merging_texts(encoder: Path) -> None:
    counts = {"running": 3, "running a": 2, "eating food": 1}
    found = merge_texts(counts, Embedder(str(encoder)), 1e-6)
    assert set(found.values()) <= {"running", "running a"}
    assert merge_texts(counts, Embedder(str(encoder)), 1.0) == {}
    assert merge_texts({}, Embedder(str(encoder)), 0.8) == {}


def test_an_encoder_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"curate\.embedder: cannot load .*expected a text encoder") as error:
        Embedder(str(tmp_path))
    assert "\n" not in str(error.value)
