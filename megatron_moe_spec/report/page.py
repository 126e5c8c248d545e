"""The report as one HTML page that needs nothing else."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape

from megatron_moe_spec.report.contents import Section
from megatron_moe_spec.report.figures import Figure

_STYLE = """
:root { color-scheme: light dark; --text: #24292f; --dim: #57606a; --page: #ffffff; --line: #d0d7de; --note: #fff8c5; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #d7dae0; --dim: #9aa4af; --page: #0d1117; --line: #30363d; --note: #3b2f0b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 84rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { margin: .3rem 0 .8rem; max-width: 60rem; }
.dim { color: var(--dim); }
.note { background: var(--note); padding: .5rem .8rem; border-radius: .4rem; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
@media (min-width: 56rem) { figure.two { grid-column: span 2; } }
img { width: 100%; height: auto; display: block; }
img.dark { display: none; }
@media screen and (prefers-color-scheme: dark) { img.dark { display: block; } img.light { display: none; } }
@media screen and (max-width: 56rem) {
  figure.two, figure.wide { overflow-x: auto; } figure.two img { width: 44rem; } figure.wide img { width: 60rem; }
}
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; font-weight: normal; white-space: normal; min-width: 7rem; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; }
@media (max-width: 30rem) { th, td { padding: .3rem .35rem; } td, thead th { font-size: .9rem; } }
@media print { body { max-width: none; padding: 0; } .figures { grid-template-columns: 1fr 1fr; }
  figure, tr { break-inside: avoid; } h2, p { break-after: avoid; } }
""".strip()
_WIDTHS = {1: "", 2: " class='two'", 3: " class='wide'"}  # of figures, by their columns of panels


def page(
    title: str, facts: list[str], notices: list[str], sections: list[Section], pictures: dict[str, tuple[bytes, bytes]]
) -> str:
    """HTML of a report; ``pictures``: PNGs of the figures by their names, for a light and for a dark page."""
    parts = [f"<p class='dim'>{'<br>'.join(map(escape, facts))}</p>"]
    parts += [f"<p class='note'>{escape(notice)}</p>" for notice in notices]
    for section in sections:
        parts.append(f"<section><h2>{escape(section.title)}</h2><p>{escape(section.sentence)}</p>")
        if section.text:
            parts.append(f"<p>{escape(section.text)}</p>")
        if section.table:
            parts.append(_table(section.title, section.table))
        if section.figures:
            shown = "".join(_figure(one, *pictures[one.name]) for one in section.figures)
            parts.append(f"<div class='figures'>{shown}</div>")
        parts.append("</section>")
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{chr(10).join(parts)}\n</main></body></html>\n"
    )


def _figure(figure: Figure, light: bytes, dark: bytes) -> str:
    # Not <picture>: browsers print the source that was on the screen, the dark one on white paper.
    images = "".join(
        f"<img class='{kind}' src='data:image/png;base64,{b64encode(png).decode()}' alt='{escape(figure.alt)}'>"
        for kind, png in (("light", light), ("dark", dark))
    )
    return f"<figure{_WIDTHS[figure.columns]}>{images}</figure>\n"


def _table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in header)
    lines = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>\n"
        for name, *cells in body
    )
    return (
        f"<div class='table' role='region' tabindex='0' aria-label='{escape(caption, quote=True)}'>"
        f"<table><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{lines}</tbody></table></div>"
    )
