"""FAST tokens against the public class's numbers, and what must hold for any chunk."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvla_lightning.action_head.fast_tokenizer import FastTokenizer


def motion(chunks: int = 60, horizon: int = 8, dim: int = 7, seed: int = 0) -> np.ndarray:
    """Smooth chunks [N, T, D] in [-1, 1] with a gripper that opens and closes."""
    random = np.random.default_rng(seed)
    time = np.linspace(0, 1, horizon)[:, None]
    shape = (chunks, 1, dim)
    waves = random.normal(size=shape) * np.sin(3 * time * random.random(shape) + random.normal(size=shape))
    waves[..., -1] = np.sign(waves[..., -1])
    return waves.clip(-1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    return FastTokenizer.fit(motion(), vocab_size=256)


def folders(golden: Path) -> list[Path]:
    found = sorted(path.parent for path in (golden / "heads" / "fast").rglob("golden.npz"))
    assert found
    return found


@pytest.mark.golden
def test_golden_ids_and_chunks(golden: Path) -> None:
    for folder in folders(golden):
        numbers, tokens = np.load(folder / "golden.npz"), json.loads((folder / "tokens.json").read_text())
        released, ours = (FastTokenizer.read(folder, unwritable=u) for u in ("drop", "nearest"))
        chunks, horizon, dim = numbers["chunks"], *numbers["chunks"].shape[1:]
        assert np.array_equal(released.coefficients(chunks), numbers["coef_rounded"])
        assert released.encode(chunks) == tokens["token_ids"], folder
        arrived = [len(chars) == horizon * dim for chars in tokens["chars_decoded"]]
        writable = (ours._nearest(numbers["codepoints"]) == numbers["codepoints"]).all(1)
        assert writable.sum() > len(chunks) / 2
        decoded, arrivals = released.decode(tokens["token_ids"], horizon, dim)
        assert [a.problem is None for a in arrivals] == arrived
        np.testing.assert_array_equal(decoded[arrived], numbers["decoded"][arrived])
        ids = ours.encode(chunks)
        assert [row for row, fine in zip(ids, writable, strict=True) if fine] == [
            row for row, fine in zip(tokens["token_ids"], writable, strict=True) if fine
        ]
        everything, arrivals = ours.decode(ids, horizon, dim)
        assert all(a.problem is None and a.frequencies == horizon for a in arrivals)
        np.testing.assert_array_equal(everything[writable], numbers["decoded"][writable])
        lost = ~np.array(arrived)
        assert (np.abs(everything - chunks)[lost].mean((1, 2)) < np.abs(chunks)[lost].mean((1, 2))).all()


@pytest.mark.golden
def test_golden_broken_sequences_give_the_frequencies_that_arrived(golden: Path) -> None:
    for folder in folders(golden):
        tokenizer = FastTokenizer.read(folder)
        _, horizon, dim = np.load(folder / "golden.npz")["chunks"].shape
        limit = tokenizer.max_token - tokenizer.min_token
        for name, case in json.loads((folder / "invalid_sequences.json").read_text()).items():
            chunk, (arrival,) = tokenizer.decode([case["ids"]], horizon, dim)
            strict = np.array(case["strict"]) if case["strict"] is not None else None
            dead = any(not 0 <= i < tokenizer.vocab_size or tokenizer.bytes_of_ids[i] is None for i in case["ids"])
            chars = case["chars"] or []
            if not dead and len(chars) == horizon * dim and max(chars, default=0) <= limit:
                assert arrival.problem is None, name
                np.testing.assert_allclose(chunk[0], strict, atol=1e-12, err_msg=name)
                continue
            assert arrival.problem is not None, name
            if not dead and len(chars) % dim == 0 and chars and max(chars) <= limit:
                # whole frequencies alone: cutting, or padding with zero coefficients, is the same
                np.testing.assert_allclose(chunk[0], np.array(case["relaxed"]), atol=1e-12, err_msg=name)
            assert np.abs(chunk).max() < 10, "a broken character must never become an action"


@pytest.mark.golden
def test_golden_fit(golden: Path) -> None:
    for folder in folders(golden):
        config = json.loads((folder / "processor_config.json").read_text())
        chunks = np.load(folder / "golden.npz")["train_chunks"]
        fitted = FastTokenizer.fit(chunks, config["vocab_size"], config["scale"], alphabet="released")
        theirs = json.loads((folder / "tokenizer.json").read_text())["model"]
        own = json.loads(fitted.bpe.to_str())["model"]
        assert own["vocab"] == theirs["vocab"]
        assert own["merges"] == theirs["merges"]
        assert (fitted.min_token, fitted.max_token) == (config["min_token"], config["max_token"])
        assert fitted.encode(chunks) == FastTokenizer.read(folder, unwritable="drop").encode(chunks)
        complete = FastTokenizer.fit(chunks, config["vocab_size"], config["scale"])
        assert len(complete._writable) == complete.max_token - complete.min_token + 1, "every value can be written"


@pytest.mark.golden
def test_golden_universal_tokenizer_is_read_from_its_folder(golden: Path) -> None:
    folder = golden / "heads" / "fast" / "universal"
    if not folder.is_dir():
        pytest.skip("this golden set has no universal tokenizer")
    config = json.loads((folder / "processor_config.json").read_text())
    universal = FastTokenizer.read(folder)
    assert (universal.scale, universal.min_token) == (config["scale"], config["min_token"])
    assert universal.vocab_size <= config["vocab_size"]
    chunks = motion(5)
    decoded, arrivals = universal.decode(universal.encode(chunks), *chunks.shape[1:])
    assert not [a.problem for a in arrivals if a.problem]
    assert np.abs(decoded - chunks).max() < 0.5 / universal.scale * chunks.shape[1]


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(0.1, 3))
def test_any_chunk_comes_back_within_its_rounding(horizon: int, dim: int, seed: int, size: float) -> None:
    tokenizer = FastTokenizer.fit(motion(), vocab_size=256)
    chunks = np.random.default_rng(seed).uniform(-size, size, (3, horizon, dim))
    decoded, arrivals = tokenizer.decode(tokenizer.encode(chunks), horizon, dim)
    assert all(arrival.problem is None for arrival in arrivals)
    coefficients = tokenizer.coefficients(chunks)
    inside = ((coefficients >= tokenizer.min_token) & (coefficients <= tokenizer.max_token)).all((1, 2))
    # rounding moves each of T orthonormal coefficients by half a step at most
    bound = 0.5 / tokenizer.scale * np.sqrt(horizon) + 1e-9
    assert (np.linalg.norm((decoded - chunks)[inside], axis=1) <= bound).all()


@settings(max_examples=100)
@given(st.lists(st.integers(-3, 400), max_size=80))
def test_any_ids_give_finite_actions_and_a_report(ids: list[int]) -> None:
    tokenizer = FastTokenizer.fit(motion(), vocab_size=256)
    chunk, (arrival,) = tokenizer.decode([ids], 8, 7)
    assert np.isfinite(chunk).all()
    assert 0 <= arrival.frequencies <= 8
    assert arrival.problem or arrival.frequencies == 8


def test_a_sequence_that_stops_early_gives_its_slow_part(tokenizer: FastTokenizer) -> None:
    chunk = motion(1, seed=5)
    (ids,) = tokenizer.encode(chunk)
    whole, _ = tokenizer.decode([ids], 8, 7)
    part, (arrival,) = tokenizer.decode([ids[: len(ids) // 2]], 8, 7)
    assert arrival.problem
    assert 0 < arrival.frequencies < 8
    assert np.abs(part).max() > 0.1, "zeros in silence"
    np.testing.assert_allclose(part.mean(1), whole.mean(1), atol=1e-9)  # the lowest frequency is the mean


def test_robots_do_not_share_state(tokenizer: FastTokenizer) -> None:
    one, other = motion(3, 8, 7), motion(3, 4, 14, seed=1)
    ids = tokenizer.encode(one)
    tokenizer.decode(tokenizer.encode(other), 4, 14)
    decoded, arrivals = tokenizer.decode(ids, 8, 7)
    assert not [a for a in arrivals if a.problem]
    assert np.abs(decoded - one).max() < 0.3


def test_saved_or_as_plain_numbers_it_comes_back(tokenizer: FastTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    chunks = motion(5, seed=2)
    for back in (FastTokenizer.read(tmp_path), FastTokenizer.from_config(json.loads(json.dumps(tokenizer.config)))):
        assert back.config == tokenizer.config
        assert back.encode(chunks) == tokenizer.encode(chunks)


def test_bad_input_is_told(tmp_path: Path, tokenizer: FastTokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks tokenizer.json and processor_config.json"):
        FastTokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "processor_config.json").write_text('{"scale": 10, "min_token": -3}')
    with pytest.raises(ValueError, match="can be read"):
        FastTokenizer.read(tmp_path)
    with pytest.raises(ValueError, match="no chunks"):
        FastTokenizer.fit([])
    with pytest.raises(ValueError, match="larger vocab_size or a smaller scale"):
        FastTokenizer.fit(motion(), vocab_size=16)
    with pytest.raises(ValueError, match="not finite"):
        tokenizer.encode(np.full((1, 8, 7), np.nan))
