"""kto-ds chat, driven through a pipe: what is answered and how it is rewarded, against transformers called by hand."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kto_ds import cli
from kto_ds.config import GenerateConfig, LoraConfig
from kto_ds.model.lora import add_adapters, adapted_layers, weight_names, without_adapters, write_adapter
from kto_ds.report.chat_view import hearing, printable
from kto_ds.stages.chat import HELP
from tests.distributed.runs import ROOT, environment, number_tokenizer, write_config, write_rows

BETA, NUM_TOKENS = 0.3, 7
GREEDY = ("--temperature", "0", "--max_new_tokens", str(NUM_TOKENS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A reference model and the export of another one, as a run would leave them, and the run's config."""
    folder = tmp_path_factory.mktemp("chat")
    shape = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    tokenizer = number_tokenizer(61)
    for seed, name in enumerate(("model", "run/export")):
        torch.manual_seed(seed)
        lm = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0))
        # What a model's makers may prefer, and a comparison must leave out.
        lm.generation_config.update(do_sample=True, top_k=1, repetition_penalty=1.7)
        lm.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_rows(folder / "rows.jsonl", [])
    write_config(
        folder / "run.yaml", output_dir=str(folder / "run"), model={"path": str(folder / "model"), "dtype": "float32"}, loss={"beta": BETA},
        data={"train": [{"path": str(folder / "rows.jsonl")}], "max_length": 64},
    )  # fmt: skip
    return folder


def chat(folder: Path, monkeypatch, capsys, *lines: str, options: tuple[str, ...] = GREEDY, exit_code: int = 0) -> str:
    """Return the transcript of lines that are piped in."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert cli.main(["chat", "--config", str(folder / "run.yaml"), *options]) == exit_code
    captured = capsys.readouterr()
    return captured.out if exit_code == 0 else captured.err


def greedy(lm: PreTrainedModel, ids: list[int]) -> list[int]:
    """One whole forward for each token, up to the end of the sequence."""
    answer = []
    while len(answer) < NUM_TOKENS and answer[-1:] != [2]:
        with torch.no_grad():
            answer.append(int(lm(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return answer


def logp(lm: PreTrainedModel, ids: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logps = lm(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
    return sum(logps[len(ids) - 1 + number, token].item() for number, token in enumerate(answer))


def answers_of(transcript: str, name: str) -> list[list[int]]:
    return [[int(word[1:]) for word in line.split()] for line in re.findall(rf"^{name}: (t[t\d ]*)$", transcript, re.MULTILINE)]


def rewards_of(transcript: str, name: str) -> list[float]:
    return [float(reward) for reward in re.findall(rf"^reward of the {name}'s answer: ([+-][\d.]+) ", transcript, re.MULTILINE)]


def shown(ids: list[int]) -> list[int]:
    """Special tokens, such as padding and the end of a sequence, are not text."""
    return [token for token in ids if token not in (0, 2)]


def test_each_speaks_behind_its_own_answers_and_both_are_rewarded(folder, monkeypatch, capsys):
    transcript = chat(folder, monkeypatch, capsys, "t5 t6 t7", "t8")
    models = {name: AutoModelForCausalLM.from_pretrained(folder / path, dtype=torch.float32).eval() for name, path in (("policy", "run/export"), ("reference", "model"))}
    for name, lm in models.items():
        first = greedy(lm, [5, 6, 7])
        behind = [5, 6, 7, *shown(first), 8]
        second = greedy(lm, behind)
        assert answers_of(transcript, name) == [shown(first), shown(second)]
        expected = [BETA * (logp(models["policy"], ids, answer) - logp(models["reference"], ids, answer)) for ids, answer in (([5, 6, 7], first), (behind, second))]
        assert rewards_of(transcript, name) == pytest.approx(expected, abs=6e-4)
        assert (expected[0] > 0) == (name == "policy"), "each thinks more of its own words than the other does"
    assert "> t5 t6 t7\n" in transcript and "no chat template" not in transcript


def test_commands_change_the_conversation(folder, monkeypatch, capsys):
    lines = ["t5", "t6", "/undo", "t6", "/reset", "t6", "/system t9", "t6", "/reset", "t6", "/system", "t6", "", "/nonsense", "/help", "/quit", "t7"]
    transcript = chat(folder, monkeypatch, capsys, *lines)
    first, second, again, alone, told, told_again, alone_again = answers_of(transcript, "policy")
    assert second == again and alone == alone_again and told == told_again and len({tuple(answer) for answer in (second, alone, told)}) == 3
    lm = AutoModelForCausalLM.from_pretrained(folder / "run/export", dtype=torch.float32).eval()
    assert told == shown(greedy(lm, [9, 6]))
    assert "'/nonsense' is not understood" in transcript and "/seed N" in transcript and "t7" not in transcript.partition("/quit")[2].partition("> /quit")[2]


def test_a_seed_brings_its_answers_back(folder, monkeypatch, capsys):
    lines = ["/seed 7", "t5", "t5", "/reset", "/seed 7", "t5", "t5", "/reset", "/seed 8", "t5"]
    transcript = chat(folder, monkeypatch, capsys, *lines, options=("--policy-only", "--max-new-tokens", "12", "--temperature", "1.5", "--top-p", "1"))
    one, two, three, four, five = answers_of(transcript, "policy")
    assert (one, two) == (three, four) and one not in (two, five)
    assert "reference" not in transcript and "reward" not in transcript


def test_without_a_template_each_line_is_a_prompt_by_itself(folder, monkeypatch, capsys, tmp_path):
    tokenizer = number_tokenizer(61)
    tokenizer.chat_template = None
    LlamaForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    transcript = chat(folder, monkeypatch, capsys, "t5", "t6", "t5", options=(*GREEDY, "--model.path", str(tmp_path / "model")))
    assert transcript.count("no chat template") == 1
    answers = answers_of(transcript, "policy")
    assert answers[0] == answers[2] != answers[1]


def test_adapters_share_their_weights_with_the_reference(folder, monkeypatch, capsys, tmp_path):
    pytest.importorskip("peft")
    lora = LoraConfig(r=4)
    lm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    add_adapters(lm, lora, seed=0)
    weights = {name: parameter.detach() for name, parameter in lm.named_parameters() if ".lora_" in name}
    torch.manual_seed(5)
    for layer in adapted_layers(weights):
        weights[weight_names(layer)[1]].normal_(std=0.3)
    write_adapter(tmp_path / "export", lora, weights, base=str(folder / "model"), revision=None)
    loaded = []
    monkeypatch.setattr("kto_ds.stages.chat.load_plain", lambda *args, original=sys.modules["kto_ds.model.load"].load_plain, **options: loaded.append(args) or original(*args, **options))
    transcript = chat(folder, monkeypatch, capsys, "t5 t6", options=(*GREEDY, "--eval.path", str(tmp_path / "export"), "--model.lora.r", "4"))
    assert len(loaded) == 1
    policy = greedy(lm.eval(), [5, 6])
    with without_adapters(lm):
        assert answers_of(transcript, "reference") == [shown(greedy(lm, [5, 6]))]
        below = logp(lm, [5, 6], policy)
    assert answers_of(transcript, "policy") == [shown(policy)]
    assert rewards_of(transcript, "policy") == pytest.approx([BETA * (logp(lm, [5, 6], policy) - below)], abs=6e-4)


def test_what_does_not_fit_the_positions_is_not_asked(folder, monkeypatch, capsys):
    transcript = chat(folder, monkeypatch, capsys, " ".join(["t5"] * 60), "t5")
    assert "this takes 67, and the model has 64 positions" in transcript and len(answers_of(transcript, "policy")) == 1


def test_the_model_that_answers_says_when_and_has_the_positions(folder, monkeypatch, capsys, tmp_path):
    other = shutil.copytree(folder / "run" / "export", tmp_path / "other")
    answer = greedy(AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval(), [5, 6])
    for file, changes in (("config.json", {"max_position_embeddings": 16}), ("generation_config.json", {"eos_token_id": [2, answer[1]]})):
        (other / file).write_text(json.dumps({**json.loads((other / file).read_text()), **changes}))
    transcript = chat(folder, monkeypatch, capsys, "t5 t6", "/reset", " ".join(["t5"] * 12), options=(*GREEDY, "--eval.path", str(other)))
    assert answers_of(transcript, "policy") == [answer[: answer.index(answer[1]) + 1]] and len(answers_of(transcript, "reference")[0]) > 2
    assert "this takes 19, and the model has 16 positions" in transcript


@pytest.mark.parametrize("key", ["eval.path", "reference.path"])
def test_another_tokenizer_is_refused(folder, monkeypatch, capsys, tmp_path, key):
    other = shutil.copytree(folder / "model", tmp_path / "other")
    number_tokenizer(62).save_pretrained(other)
    error = chat(folder, monkeypatch, capsys, "t5", options=(*GREEDY, f"--{key}", str(other)), exit_code=2)
    assert re.search(rf"{key}: .*tokenizer", error, re.DOTALL) and "share the tokenizer of model.path" in error


def test_a_seed_is_no_longer_than_one_of_a_run(folder, monkeypatch, capsys):
    transcript = chat(folder, monkeypatch, capsys, f"/seed {'9' * 30}", f"/seed {2**32}", f"/seed {'9' * 5000}", f"/seed {2**32 - 1}", "t5")
    assert transcript.count("is not understood") == 3 and len(answers_of(transcript, "policy")) == 1


def test_lack_of_memory_takes_a_question_back_or_is_one_message(folder, monkeypatch, capsys):
    short = [True]

    def generate(self, *args, original=LlamaForCausalLM.generate, **options):
        if short:
            short.pop()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    transcript = chat(folder, monkeypatch, capsys, "t5 t6", "t8")
    lm = AutoModelForCausalLM.from_pretrained(folder / "run/export", dtype=torch.float32).eval()
    assert "no memory left for this answer" in transcript and answers_of(transcript, "policy") == [shown(greedy(lm, [8]))]

    def load(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    error = chat(folder, monkeypatch, capsys, "t5", exit_code=2)
    assert "do not fit into the device's memory" in error and "--policy_only" in error


def test_spaces_and_joiners_of_other_scripts_are_text_and_control_codes_are_not():
    text = "12\u202f000\u00a0km\u3000\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469\n\t\u200f"
    assert printable(text) == text
    assert printable("a\x1b[2J\r\x9b\ud800\u202e\u2066\u2069b") == "a\ufffd[2J" + "\ufffd" * 6 + "b"


@pytest.mark.parametrize("options, message", [
    (("--output_dir", "{}/nowhere"), r"there is no model at .*nowhere/export\n.*remedy: run kto-ds export"),
    (("--output_dir", "{}/nowhere", "--checkpoint", "latest"), "there is no checkpoint"),
    (("--checkpoint", "newest"), "no such checkpoint: 'newest'"),
    (("--top-p", "1.5"), "--top_p"),
    (("--max-new-tokens", "0"), "--max_new_tokens"),
])  # fmt: skip
def test_refusals_are_one_message(folder, monkeypatch, capsys, options, message):
    error = chat(folder, monkeypatch, capsys, "t5", options=tuple(option.format(folder) for option in options), exit_code=2)
    assert re.search(message, error) and "Traceback" not in error


def test_a_wide_terminal_has_two_columns_and_a_narrow_one_has_lines():
    texts = {}
    for width in (120, 60):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        with hearing(console, ["policy", "reference"]) as hear:
            hear("policy", "alpha\x1b[2J")
            hear("reference", "beta")
        texts[width] = [line for line in console.file.getvalue().splitlines() if "alpha" in line or "beta" in line]
    assert re.search(r"alpha\ufffd\[2J {2,}.* beta", texts[120][-1])
    assert texts[60] == ["policy: alpha\ufffd[2J", "reference: beta"]


def test_ctrl_c_breaks_an_answer_off_and_takes_the_question_back(folder, monkeypatch, capsys):
    signals = [signal.SIGINT]

    @contextlib.contextmanager
    def interrupted(console, names):
        with hearing(console, names) as hear:

            def hear_and_press(name: str, piece: str) -> None:
                hear(name, piece)
                if signals:
                    os.kill(os.getpid(), signals.pop())

            yield hear_and_press

    monkeypatch.setattr("kto_ds.stages.chat.hearing", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        transcript = chat(folder, monkeypatch, capsys, "t5 t6", "t8")
    finally:
        signal.signal(signal.SIGINT, before)
    lm = AutoModelForCausalLM.from_pretrained(folder / "run/export", dtype=torch.float32).eval()
    assert "broken off, and taken back" in transcript
    assert answers_of(transcript.partition("taken back")[2], "policy") == [shown(greedy(lm, [8]))]


def test_every_option_that_the_page_shows_is_one(folder):
    page = (ROOT / "docs" / "generation.md").read_text()
    shown = [line.partition("#")[0].partition("<")[0].split() for line in page.splitlines() if line.startswith("kto-ds chat")]
    assert len(shown) > 3
    given = [cli.read_config("chat", [str(folder / "run.yaml") if word == "run.yaml" else word for word in words[2:]])[1] for words in shown]
    assert {vars(options)["checkpoint"] for options in given} == {None, "latest"} and {vars(options)["temperature"] for options in given} == {0.7, 0.0}
    assert set(re.findall(r"`(/\w+)", page)) == set(re.findall(r"^  (/\w+)", HELP, re.MULTILINE))
    config = YAML(typ="safe").load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    assert config["eval"]["generate"].keys() < set(re.findall(r"^\| `(\w+)` \| [\d.]+ \|", page, re.MULTILINE)) == GenerateConfig.model_fields.keys()


@pytest.mark.slow
@pytest.mark.parametrize("width, mark", [(120, "\u2503"), (80, "policy: ")])
def test_at_a_terminal(folder, width, mark):
    """Through a pseudo-terminal: an answer as it comes, and Ctrl-D."""
    variables = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES")} | {"TERM": "xterm-256color"}
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, "-m", "kto_ds", "chat", "--config", str(folder / "run.yaml"), *GREEDY], variables)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))

    def read_until(text: bytes) -> bytes:
        read, deadline = b"", time.monotonic() + 180
        while text not in read:
            assert time.monotonic() < deadline, read.decode(errors="replace")
            if select.select([terminal], [], [], 1.0)[0]:
                read += os.read(terminal, 65536)
        return read

    read_until(b"\n> ")
    os.write(terminal, b"t5 t6\r")
    read = read_until(b"\n> ").decode()  # the echo of what was typed has none
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert mark in read and "reward of the reference's answer" in read
