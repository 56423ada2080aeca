"""A report in Markdown, and the same as one HTML page: pictures inside it, videos to play beside it."""

import base64
import html
import mimetypes
import re
from collections.abc import Sequence
from pathlib import Path

from openvla_lightning.runtime.files import write_text

RUN_PAGE = "report.md"
"""Name of the page in the folder of a training run, or of an evaluation; the HTML stands beside it."""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }}
th, td {{ padding: .25em .6em; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }}
td[style*="right"] {{ white-space: nowrap }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: #fff }}
img {{ max-width: 100% }}
code {{ overflow-wrap: anywhere }}
video {{ width: 320px; max-width: 100%; display: block }}
@media (max-width: 640px) {{  /* wide pictures keep their letters, and move sideways as tables do */
p:has(> img) {{ overflow-x: auto }}
img {{ max-width: none }}
h1 {{ overflow-wrap: anywhere }}
}}
</style></head><body>
{body}</body></html>
"""


def write_page(lines: Sequence[str], path: Path) -> Path:
    """Write Markdown to `path` and HTML beside it; return `path`."""
    from markdown_it import MarkdownIt

    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines).rstrip() + "\n"
    write_text(path, text)

    def picture(match: re.Match[str]) -> str:
        content = base64.b64encode((path.parent / match[1]).read_bytes()).decode()
        return f'src="data:{mimetypes.guess_type(match[1])[0]};base64,{content}"'

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'src="([^":]+\.(?:png|jpg))"', picture, body)
    body = re.sub(r'<a href="([^":]+\.mp4)">(.*?)</a>', r'\2<video controls preload="metadata" src="\1"></video>', body)
    title = html.escape(lines[0].lstrip("# "))
    write_text(path.with_suffix(".html"), PAGE.format(title=title, body=body))
    return path


def escape(text: str) -> str:
    """What Markdown shows as `text`, on one line."""
    return re.sub(r"([\\`*\[\]<>|~&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
