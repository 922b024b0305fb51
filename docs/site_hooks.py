"""What the site has beside the pages in this folder: files from elsewhere, and text that the code says of itself.

MkDocs calls these functions (``hooks`` in mkdocs.yml).
"""

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from randes.cli import app
from randes.config import Config

ROOT = Path(__file__).parent.parent
PAGES = {
    "index.md": "README.md", "SECURITY.md": "SECURITY.md", "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md", "LICENSE.txt": "LICENSE", "CITATION.cff": "CITATION.cff",
}  # fmt: skip
"""Where a file of the repository is on the site, and where it comes from."""
FOLDERS = {"examples": ("*.md", "*.py"), "bench/results": ("*.png",), "bench/results/cpu": ("*.png",)}
MOVED = {"README.md": "index.md", "LICENSE": "LICENSE.txt"}
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds files from outside ``docs``, and leaves out its Python."""
    for file in list(files):
        if file.src_uri.endswith(".py"):
            files.remove(file)
    found = dict(PAGES)
    for folder, patterns in FOLDERS.items():
        for pattern in patterns:
            found |= {f"{folder}/{path.name}": f"{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)}
    for uri, source in found.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site, and what is generated in the place of its mark."""
    for mark, generated in GENERATED.items():
        if (line := f"<!-- {mark} -->") in markdown:
            markdown = markdown.replace(line, generated())
    source = PAGES.get(page.file.src_uri, page.file.src_uri)
    here = "" if page.file.src_uri in PAGES else "docs" if "/" not in source else str(Path(source).parent)
    depth = page.file.src_uri.count("/")

    def on_site(found: re.Match[str]) -> str:
        target = (ROOT / here / found[2]).resolve().relative_to(ROOT).as_posix()
        target = MOVED.get(target, target.removeprefix("docs/"))
        return found[1] + "../" * depth + target

    return LINK.sub(on_site, markdown)


def command_line() -> str:
    """Every command with its arguments and options, as ``--help`` has them."""
    root: Any = typer.main.get_command(app)
    parts = []
    for name, command in root.commands.items():
        context = command.make_context(f"randes {name}", [], resilient_parsing=True)
        parts += [f"## randes {name}", _escaped(command.help or ""), f"```text\n{_usage(command, context)}\n```"]
        rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
        parts.append("| | |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _usage(command: Any, context: Any) -> str:
    return " ".join([context.info_name, *command.collect_usage_pieces(context)])


def _row(parameter: Any) -> str:
    named = ", ".join([*parameter.opts, *parameter.secondary_opts]) if parameter.param_type_name == "option" else ""
    shown = f"`{named or parameter.metavar or parameter.name.upper()}`"
    default = parameter.default
    plain = default is None or callable(default) or isinstance(default, bool)
    kept = "" if plain or parameter.required else f" Default: `{default}`."
    return f"| {shown} | {_escaped((getattr(parameter, 'help', '') or '') + kept)} |"


def configuration() -> str:
    """The fields of ``Config``, their defaults, and what its docstring says of them."""
    text = re.sub(r"\s*\n {8,}", " ", (Config.__doc__ or ""))
    said = dict(re.findall(r"(?m)^ {4}([\w, ]+): (.*)$", text))
    rows = []
    for one in fields(Config):
        default = one.default if one.default is not MISSING else one.default_factory()  # type: ignore[misc]
        line = next(value for names, value in said.items() if one.name in names.split(", "))
        rows.append(f"| `{one.name}` | `{default!r}` | {_escaped(line)} |")
    return "| field | default | what it says |\n|---|---|---|\n" + "\n".join(rows)


def _escaped(text: str) -> str:
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


GENERATED = {"command line": command_line, "configuration": configuration}
