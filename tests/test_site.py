"""The documentation site: it builds with warnings as errors, links and anchors among them, and holds what it should."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import randes
from randes.cli import app

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "python_api")))
    told = {**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"}
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder)
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=told)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def test_every_command_and_option_is_on_the_site(site: Path) -> None:
    page = (site / "command-line" / "index.html").read_text(encoding="utf-8")
    for command in app.registered_commands:
        assert command.callback is not None
        name = (command.name or command.callback.__name__).replace("_", "-")
        assert f'id="randes-{name}"' in page, name
    assert "--group-size" in page
    assert "Models that share one superposition." in page


def test_every_field_of_the_configuration_is_on_the_site(site: Path) -> None:
    page = (site / "configuration" / "index.html").read_text(encoding="utf-8")
    for field in fields(randes.Config):
        assert re.search(
            rf"<td><code>{field.name}</code></td>\s*<td><code>.+?</code></td>\s*<td>.{{20,}}?</td>", page
        ), field


def test_public_names_are_on_the_site(site: Path) -> None:
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("compress", "load", "plan", "choose", "Superposition", "SuperposedModel", "calibrate"):
        assert f'id="randes.{name}"' in page, name
    for name in ("Superposition.retrieve", "SuperposedModel.add_adapter", "errors.UnknownModelError"):
        assert f'id="randes.{name}"' in page, name
    assert "<strong>group</strong>: the superposition it joins" in page, "arguments are lists"
    assert "``" not in page


def test_the_first_page_is_the_readme_with_its_pictures(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img alt="[^"]+" src="([^"]+)"', page)
    assert len(shown) == 3
    assert all((site / source).is_file() for source in shown)
