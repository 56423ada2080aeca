"""Execution of `openvla fit-fast`: it fits a FAST tokenizer to the actions of a mixture."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from openvla_lightning.action_head.fast_tokenizer import FastTokenizer
from openvla_lightning.config import ConfigError, blaming_config, for_people
from openvla_lightning.report.tables import markdown
from openvla_lightning.run.start import open_mixture

log = logging.getLogger(__name__)


@for_people(ConfigError)
def fit_fast(cfg: DictConfig) -> Path:
    """Fit a tokenizer, print the lengths of sequences and the loss of precision, and return the folder.

    Raises:
        ConfigError: something is wrong or missing; the message names it.
    """
    datamodule = open_mixture(cfg)
    with blaming_config():  # for a damaged file, or a vocabulary that is too small
        learnt = chunks(datamodule.train, datamodule.shares, cfg.chunks, cfg.seed)
        tokenizer = FastTokenizer.fit([chunk for part in learnt.values() for chunk in part], cfg.vocab_size, cfg.scale)
    folder = Path(cfg.paths.output_dir) / "tokenizer"
    tokenizer.save(folder)
    held_out = {name: part for name, part in datamodule.val.items() if len(part)}
    shown = chunks(held_out, datamodule.shares, min(cfg.chunks, 2000), cfg.seed) or learnt
    measures = [measured(name, tokenizer, part) for name, part in shown.items()]
    rows = [list(measures[0]), *(list(row.values()) for row in measures)]
    what = "held-out" if held_out else "learnt"
    log.info(
        f"{tokenizer.vocab_size} ids, of {sum(map(len, learnt.values())):,} chunks. On {what} ones:\n{markdown(rows)}"
    )
    log.info(f"written to {folder}; train with action_head=fast action_head.tokenizer={folder}")
    return folder


def chunks(datasets: dict[str, Any], shares: dict[str, float], most: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Chunks [n, T, D] of each dataset, normalised and clipped to [-1, 1], in the mixture's shares, `most` in all."""
    chunks_by_name = {}
    for name, steps in datasets.items():
        wanted = min(len(steps), max(1, round(most * shares[name])))
        positions = np.sort(np.random.default_rng(seed).choice(len(steps), wanted, replace=False))
        chunks_by_name[name] = steps.actions(positions).clip(-1, 1)
    return chunks_by_name


def measured(name: str, tokenizer: FastTokenizer, actions: NDArray[np.float32]) -> dict[str, str]:
    """One row of the table: the number of ids per chunk, and the errors of the decoded actions."""
    ids = tokenizer.encode(actions)
    lengths = [len(row) for row in ids]
    decoded, _ = tokenizer.decode(ids, *actions.shape[1:])
    error = np.abs(decoded - actions)
    return {
        "dataset": name,
        "chunks": f"{len(actions):,}",
        "numbers": str(actions[0].size),
        "ids, mean": f"{np.mean(lengths):.1f}",
        "ids, most": str(max(lengths)),
        "error, mean": f"{error.mean():.4f}",
        "error, most": f"{error.max():.3f}",
    }
