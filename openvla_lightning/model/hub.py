"""Sources of weights and tokenizers: a folder, the Hugging Face cache, the hub."""

import re
from difflib import get_close_matches
from pathlib import Path

import httpx
from huggingface_hub import constants

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.+-]+")
_PRISMATIC_NAME = re.compile(r"[\w.-]+\+\d+b")
_PRISMATIC_HINT = """
That is the name of a Prismatic VLM. Download it where there is a network and give its folder:
  hf download TRI-ML/prismatic-vlms --include "{0}/*" --local-dir prismatic   # then prismatic/{0}"""


def check_source(source: str | Path) -> None:
    """Check within seconds whether `source` can be found, without loading or downloading it.

    Raises:
        FileNotFoundError: it is missing; the message says where to get it.
    """
    text = str(source)
    if Path(text).expanduser().exists():
        return
    on_disk = Path(text).parts[:1] and Path(Path(text).parts[0]).is_dir()  # `runs/nothere` is no hub id
    if on_disk or text.startswith((".", "/", "~")) or text.endswith((".pt", ".ckpt")) or not _HUB_ID.fullmatch(text):
        hint = _PRISMATIC_HINT.format(text) if _PRISMATIC_NAME.fullmatch(text) else ""
        raise FileNotFoundError(f"there is no file or folder {text}{_beside(Path(text).expanduser())}{hint}")
    if _in_cache(text) or _on_hub(text):
        return
    raise FileNotFoundError(
        f"{text} is neither a local folder nor in the Hugging Face cache, and the hub does not answer for it.\n"
        f"Download it where there is a network (hf download {text} --local-dir DIR) and give the folder instead."
    )


def _beside(path: Path) -> str:
    """What the folder around `path` contains, if that folder exists; for error messages."""
    if not path.parent.is_dir():
        return ""
    there = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    near = get_close_matches(path.name, there, 3) or there[-3:]
    return f"; {path.parent} holds {', '.join(near)}" if near else f"; {path.parent} is empty"


def _in_cache(repository: str) -> bool:
    folder = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    return any(folder.glob("snapshots/*/*"))


def _on_hub(repository: str) -> bool:
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        url = f"{constants.ENDPOINT}/{repository}/resolve/main/config.json"
        return httpx.head(url, timeout=5.0, follow_redirects=True).status_code == 200
    except (httpx.HTTPError, OSError):
        return False
