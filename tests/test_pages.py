"""The code on the pages runs: Python blocks, and lines that begin with ``randes``, in the order of the page."""

import copy
import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from typer.testing import CliRunner

import randes
from randes.checkpoints.sources import write_file
from randes.cli import app

ROOT = Path(__file__).parent.parent
ELSEWHERE = ("demo", "serve")
"""Commands that have tests of their own, and take minutes or do not end."""
OTHER_ENVIRONMENTS = ("litserve", "vllm", "remote")
"""Pages whose Python needs a server: what it does is done in ``tests/litserve``, ``vllm`` and ``remote``."""
FILES = ("german", "legal", "medical", "json", "rot90", "flip", "a")
FOLDERS, ADAPTERS = ("german", "legal", "medical"), ("german-lora", "legal-lora", "labels-lora")


class Net(nn.Module):
    """What the pages call a model."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Code(NamedTuple):
    """A block of a page, or one line of the command line."""

    text: str
    is_python: bool


BLOCK = re.compile(r"^```python\n(?P<python>.*?)^```$|^    (?P<command>randes [^\n]*)$", re.DOTALL | re.MULTILINE)


def code_of(page: Path) -> list[Code]:
    text = page.read_text(encoding="utf-8")
    found = (Code(block["python"] or block["command"], bool(block["python"])) for block in BLOCK.finditer(text))
    return [code for code in found if code.is_python or not (code.text.split()[1] in ELSEWHERE or "://" in code.text)]


ALL = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = [page for page in ALL if code_of(page) and page.stem not in OTHER_ENVIRONMENTS]


def test_no_page_is_left_out() -> None:
    names = {page.name for page in PAGES}
    assert names >= {
        "README.md",
        "getting-started.md",
        "tuning.md",
        "serving.md",
        "transformers.md",
        "lora.md",
        "paper.md",
    }
    for page in ALL:
        blocks = re.findall(r"^```(\w*)", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert {*blocks} <= {"python", "", "console", "text"}, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = GIVEN.get(page.stem, stand_ins)(tmp_path)
    for code in code_of(page):
        if page.stem in BY_THEMSELVES:
            names = GIVEN[page.stem](tmp_path)
        if code.is_python:
            exec(compile(code.text, page.name, "exec"), names)
        else:
            run(code.text)
    if page.name == "README.md":
        assert names["y"].shape == (4, 64)
        assert names["state"].keys() == names["base"].state_dict().keys()


def run(line: str) -> None:
    """A line as a shell takes it; "..." stands for more of the same."""
    arguments = shlex.split(line.replace(" ...", ""), comments=True)[1:]
    if arguments[0] == "compress":  # the same as a block above it did
        shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, f"{line}\n{ran.output}"


# ---------------------------------------------------------------- what the pages take as given


def stand_ins(folder: Path) -> dict[str, Any]:
    """A base, fine-tunes of it, and their files in the folder."""
    torch.manual_seed(0)
    base = Net()
    models = {}
    write_file(folder / "base.safetensors", base.state_dict())
    for name in FILES:
        models[name] = copy.deepcopy(base)
        for value in models[name].parameters():
            value.data += 0.02 * torch.randn_like(value)
        write_file(folder / f"{name}.safetensors", models[name].state_dict())
    for name in FOLDERS:
        (folder / name).mkdir(exist_ok=True)
        write_file(folder / name / "model.safetensors", models[name].state_dict())
    for name in ADAPTERS:
        write_adapter(folder / name, base)
    few = {name: models[name] for name in FOLDERS}
    return {"randes": randes, "base": base, "models": few, "x": torch.ones(4, 64), "Net": Net, **few}


def write_adapter(folder: Path, base: nn.Module) -> None:
    """A LoRA adapter of the base's two layers, as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name in ("up", "down"):
        rows, columns = base.get_submodule(name).weight.shape  # type: ignore[operator]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, columns)
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.01 * torch.randn(rows, 4)
    write_file(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def tuning(folder: Path) -> dict[str, Any]:
    """Data beside them: inputs of the base, and for each model batches of inputs and labels."""
    given = stand_ins(folder)
    batches = [SimpleNamespace(x=torch.randn(8, 64), y=torch.randint(64, (8,))) for _ in range(4)]
    return given | {"batches": [batch.x for batch in batches], "loaders": dict.fromkeys(FOLDERS, batches)}


def serving(folder: Path) -> dict[str, Any]:
    """A store's integers with two models, served; requests that wait; and, for a captured graph, the call itself."""
    given = stand_ins(folder)
    sup = randes.compress(copy.deepcopy(given["base"]), {name: folder / name for name in ("german", "legal")})
    model = randes.load(sup, Net(), capacity=16)
    answers: dict[str, Tensor] = {}
    waiting = [
        SimpleNamespace(name=name, x=torch.ones(64), answer=lambda row, name=name: answers.update({name: row}))
        for name in ("german", "__base__")
    ]
    requests = iter([waiting, []])
    given |= {"sup": sup, "model": model, "names": ["legal"] * 3, "x": torch.ones(3, 64), "tokens": torch.zeros(3, 64)}
    given["graph"] = SimpleNamespace(replay=lambda: model(given["x"], adapter_names=given["batch"]))
    given["stack"] = lambda waiting: torch.stack([each.x for each in waiting])
    given["take_requests"] = lambda: next(requests)
    return given


def transformers(folder: Path) -> dict[str, Any]:
    """Folders of a small Llama and two fine-tunes, each with a tokenizer of the words that the page has."""
    words = ["[PAD]", "[UNK]", "Guten", "Tag", "The", "party", "of", "Once"]
    tokens = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, "[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]")
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = hf.LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0, bos_token_id=2, eos_token_id=63)
    torch.manual_seed(0)
    base: Any = hf.LlamaForCausalLM(config)
    for name in ("base", "german", "legal"):
        model = copy.deepcopy(base)
        for value in () if name == "base" else model.parameters():
            value.data += 0.02 * torch.randn_like(value)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {}


def report(folder: Path) -> dict[str, Any]:
    """A store to report on."""
    given = stand_ins(folder)
    randes.compress(given["base"], {"german": "german.safetensors", "json": "json.safetensors"}).save("store")
    return given


def paper(folder: Path) -> dict[str, Any]:
    """FusionBench's file."""
    lines = ("name: superposed_task_arithmetic", "mode: random_binary_diagonal_matrix", "target_layer: all")
    (folder / "superposed_task_arithmetic.yaml").write_text("\n".join(lines))
    return stand_ins(folder)


GIVEN = {"tuning": tuning, "serving": serving, "transformers": transformers, "report": report, "paper": paper}
BY_THEMSELVES = ("serving",)
"""Pages whose blocks do not go on from each other."""
