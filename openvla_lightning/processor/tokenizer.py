"""Text <-> ids: the tokenizer of a language model, or a tiny one made in memory."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from openvla_lightning.model.hub import TOKENIZER_FILES, check_source

TINY_VOCAB_SIZE = 768
"""Size of the tiny vocabulary: ids of text below 512, then 256 for actions."""

_SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
_TEXT_IDS = TINY_VOCAB_SIZE - 256
_WORDS = """
a all and any as at be bin block blue bottle bowl box brown button by can cabinet close closed corner cube cup cylinder
disc dish door down drawer drop edge eggplant fold forward from front gently get give grab grasp gray green grey grip
gripper hand hold in inside into is it item knife left lever lid lift lower lying make me middle mug move near nearest
next object of off on onto open orange other out over pick pink plate place please point poke pot press pull purple
push put raise reach red release right ring robot rotate round shift slide small so spoon square stack stop sweep table
take tap tea that the them then this to top touch towards towel tray turn turquoise under until up upright upwards
upside vertical white with yellow your back behind ball bottom action what should middle marker black cloth cyan gold
towards target toward side sideways little bit big large tall short far away one two three : ? , . - !
"""


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or hub id; `tiny` for one that needs no download.

    Raises:
        FileNotFoundError: when neither a folder nor the hub has it.
    """
    if str(name) == "tiny":
        return tiny_tokenizer()
    try:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            check_source(name)
            folder = Path(snapshot_download(str(name), allow_patterns=list(TOKENIZER_FILES)))
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        # Without this config, transformers reads the folder's and asks whether to run the code that it names.
        return AutoTokenizer.from_pretrained(folder, config=LlamaConfig(), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no tokenizer at {str(name)!r}: {str(error).splitlines()[0]}\nGive the folder of a checkpoint that holds "
            "tokenizer files with processor.tokenizer=/path/to/folder (model.llm.name=... sets it too)"
        ) from error


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one id for each word of the tabletop world's instructions; all other text becomes bytes.

    The vocabulary is fixed: 4 special ids, 256 bytes, common words, unused ids up to 511. Ids 512 to 767 belong to
    actions and never occur in text.
    """
    words = [f"▁{word}" for word in dict.fromkeys(_WORDS.split())]
    pieces: list[tuple[str, float]] = [(piece, 0.0) for piece in _SPECIALS]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [("▁", -5.0)]
    pieces += [(word, -1.0) for word in words]
    if len(pieces) > _TEXT_IDS:
        raise ValueError(f"the tiny vocabulary holds {_TEXT_IDS} text ids, got {len(pieces)}")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    specials: dict[str, Any] = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
