"""Reading a run's file: the message for each thing that it may not say."""

import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
from config_texts import problems, read

from raytorch.config import ModelKeys, RunConfig
from raytorch.config.file import dump_config, load_config
from raytorch.errors import ConfigError

TOP = ", ".join(RunConfig.model_fields)
KEYS = ", ".join(["name", *ModelKeys.model_fields])
NAME = "1 to 128 letters, digits, '.', '_' or '-', of which the first is a letter or digit"
OPTIMIZERS = "one of sgd, asgd, adam, adamw, nadam, radam, adamax, adafactor, adagrad, adadelta, rmsprop, rprop, muon"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -- what a file may not say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        # keys
        ("epoch: 3", f"epoch: unknown key; allowed: {TOP} (did you mean 'epochs'?)"),
        ('"a.b": 3', f"'a.b': unknown key; allowed: {TOP}"),
        (
            "loss: {smoothing: 0.1}",
            "loss.smoothing: unknown key; allowed: name, label_smoothing (did you mean 'label_smoothing'?)",
        ),
        (
            "optimizer: {name: adam, momentum: 0.9}",
            "optimizer.momentum: unknown key; allowed: name, lr, betas, eps, amsgrad, weight_decay, groups",
        ),
        (
            "data: {name: digits, augment: {flop: true}}",
            "data.augment.flop: unknown key; allowed: crop, flip (did you mean 'flip'?)",
        ),
        ("optimizer: {lr: 1}", f"optimizer.name: missing; must be {OPTIMIZERS}"),
        ("scaling: {workers: {min: 1}}", "scaling.workers.max: missing; must be a whole number of at least 1"),
        # names
        ("optimizer: Adam", f"optimizer: must be {OPTIMIZERS}, not 'Adam' (did you mean 'adam'?)"),
        ("optimizer: {name: 3}", f"optimizer.name: must be {OPTIMIZERS}, not 3"),
        ("optimizer: 3", f"optimizer: must be {OPTIMIZERS} or {{name: ...}}, not 3"),
        (
            "loss: {name: mes}",
            "loss.name: must be one of cross_entropy, bce, bce_with_logits, mse or FILE.py:NAME of your own, "
            "not 'mes' (did you mean 'mse'?)",
        ),
        (
            "loss: [mse]",
            "loss: must be one of cross_entropy, bce, bce_with_logits, mse or FILE.py:NAME of your own "
            "or a mapping with keys among name, label_smoothing or {name: ...}, not a list of 1",
        ),
        (
            "precision: fp64",
            "precision: must be one of auto, fp32, tf32, bf16, fp16, not 'fp64' (did you mean 'fp16'?)",
        ),
        # numbers and booleans
        ("batch_size: abc", "batch_size: must be a whole number of at least 1, not 'abc'"),
        ("batch_size: 1.0", "batch_size: must be a whole number of at least 1, not 1.0"),
        ("batch_size: true", "batch_size: must be a whole number of at least 1, not the boolean true"),
        ("batch_size:", "batch_size: must be a whole number of at least 1, not null"),
        ("batch_size: [1]", "batch_size: must be a whole number of at least 1, not a list of 1"),
        ("batch_size: {a: 1}", "batch_size: must be a whole number of at least 1, not a mapping"),
        ("steps: '5'", "steps: must be a whole number of at least 1 or null, not '5'"),
        ("clip_norm: .inf", "clip_norm: must be a number above 0 or null, not .inf"),
        ("compile: 1", "compile: must be true or false, not 1"),
        ("compile: 'yes'", "compile: must be true or false, not 'yes'"),
        (
            "scaling: {gpus_per_worker: 2}",
            "scaling.gpus_per_worker: must be a number of at least 0 and at most 1, not 2",
        ),
        ("failure: {max_restarts: -2}", "failure.max_restarts: must be a whole number of at least -1, not -2"),
        # text
        ("storage: true", "storage: must be text, not the boolean true; quote it: 'true'"),
        ("name: 007", f"name: must be {NAME}, not 007; quote it: '007'"),
        ("name: true", f"name: must be {NAME}, not the boolean true; quote it: 'true'"),
        ("name: 1e-3", f"name: must be {NAME}, not 1e-3; quote it: '1e-3'"),
        ("name: a/b", f"name: must be {NAME}, not 'a/b'"),
        (f"name: {'a' * 200}", f"name: must be {NAME}, not '{'a' * 60}...'"),
        (r'name: "\ud800"', rf"name: must be {NAME}, not '\ud800'"),
        # sections and lists
        (
            "failure: 3",
            "failure: must be a mapping with keys among max_restarts, not 3",
        ),
        ("model: {name: mlp, hidden: [8, x]}", "model.hidden[1]: must be a whole number of at least 1, not 'x'"),
        (
            "model: {name: mlp, hidden: []}",
            "model.hidden: must be a list of 1 or more, each a whole number of at least 1, not a list of 0",
        ),
        (
            "optimizer: {name: adam, betas: [0.9]}",
            "optimizer.betas: must be a list of 2, each a number of at least 0 and below 1, not a list of 1",
        ),
        # a number or a mapping
        (
            "scaling: {workers: x}",
            "scaling.workers: must be a whole number of at least 1 or {min: ..., max: ...}, not 'x'",
        ),
        (
            "scaling: {workers: 0}",
            "scaling.workers: must be a whole number of at least 1 or {min: ..., max: ...}, not 0",
        ),
        ("scaling: {workers: {min: 0, max: 1}}", "scaling.workers.min: must be a whole number of at least 1, not 0"),
        ("scaling: {workers: {min: 3, max: 2}}", "scaling.workers.min: min (3) must not exceed max (2)"),
        # metrics
        ("metrics: accuracy", "metrics: must be a list, each text or {name: ...}, not 'accuracy'"),
        ("metrics: [3]", "metrics[0]: must be text or {name: ...}, not 3; quote it: '3'"),
        ("metrics: [{better: lower}]", "metrics[0].name: missing; must be a metric's name or text"),
        (
            "metrics: [{name: accuracy, better: lowr}]",
            "metrics[0].better: must be one of higher, lower, not 'lowr' (did you mean 'lower'?)",
        ),
        (
            "metrics: [time]",
            "metrics[0]: a metric cannot be called time, which metrics.jsonl has for something else; rename it",
        ),
        ("checkpoint: {best_by: f2}", "checkpoint.best_by: no metric f2 in this run; one of accuracy, loss"),
        ("checkpoint: {best_by: 3}", "checkpoint.best_by: must be text or null, not 3; quote it: '3'"),
        # values that do not go together
        ("model: {name: vit, heads: 3}", "model.heads: dim (64) must be a multiple of heads (3)"),
        (
            "data: {name: moving_mnist}",
            "data.name: model mlp reads images or rows, data moving_mnist has clips; take data digits or mnist or "
            "cifar10 or arrays or images or shards or table, or model conv3d",
        ),
        # keys that are not text
        ("3: 4", "a key must be plain text, not 3"),
        ("true: 4", "a key must be plain text, not the boolean true"),
        # models that cannot read the data
        ("model: {name: vit, patch: 3}", "model.patch: patch (3) must divide the image's height and width (8 x 8)"),
        (
            "model: {name: convnet, channels: [8, 8, 8, 8]}",
            "model.channels: channels has 4 entries, each of which halves the image; 8 x 8 pixels allow for 3",
        ),
        (
            "<<: {model: {name: conv3d, channels: [8, 8, 8, 8, 8, 8]}, data: {name: moving_mnist, canvas: 40}}",
            "model.channels: channels has 6 entries, each of which halves the image; 40 x 40 pixels allow for 5",
        ),
        (
            "<<: {data: {name: mnist_strips, max_digits: 3}, model: {name: seq2seq, columns: 5}}",
            "model.columns: columns (5) must divide the image's width (84)",
        ),
        (
            "data: {name: digits, augment: {crop: 8}}",
            "data.augment.crop: augment.crop (8) must be below the image's height and width (8 x 8)",
        ),
        # what YAML 1.1 had
        ("compile: yes", "compile: must be true or false, not 'yes'"),
        ("seed: 1_000", "seed: must be a whole number of at least 0 and below 4294967296, not '1_000'"),
        ("seed: 1:30", "seed: must be a whole number of at least 0 and below 4294967296, not '1:30'"),
        (r'"a\nb": 4', r"a key must be plain text, not 'a\nb'"),
        ("? [a]\n: 4", "a key must be plain text, not a list of 1"),
    ],
)
def test_a_line_that_is_refused(line: str, problem: str) -> None:
    assert problems(f"epochs: 1\n{line}\n") == [f"run.yaml:2: {problem}"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "run.yaml: the file is empty; give at least epochs or steps"),
        ("# nothing yet\n", "run.yaml: the file is empty; give at least epochs or steps"),
        ("\n- epochs: 1\n", f"run.yaml:2: must be a mapping with keys among {TOP}, not a list of 1"),
        ("epochs 1", f"run.yaml:1: must be a mapping with keys among {TOP}, not 'epochs 1'"),
        ("# a run\nseed: 1\n", "run.yaml:2: epochs: give epochs or steps"),
        (
            "epochs: 2\nbatch_size: 500\nschedule:\n  name: cosine\n  warmup_steps: 6\n",
            "run.yaml:5: schedule.warmup_steps: warmup_steps (6) must be below the steps of the run (6)",
        ),
        ("steps: 1\nepochs: 1\n", "run.yaml:2: epochs: give either epochs or steps, not both"),
        ("epochs: 1\nseed: 1\nseed: 2\n", "run.yaml:3: seed: duplicate key, first given on line 2"),
        (
            "epochs: 1\noptimizer:\n  name: sgd\n  lr: 0.1\n\n  lr: 0.2\n",
            "run.yaml:6: optimizer.lr: duplicate key, first given on line 4",
        ),
        (
            "epochs: 1\noptimizer:\n  name: sgd\n\n  lr: fast\n",
            "run.yaml:5: optimizer.lr: must be a number above 0, not 'fast'",
        ),
        (
            "epochs: 1\nmodel:\n  name: mlp\n  hidden:\n    - 8\n    - x\n",
            "run.yaml:6: model.hidden[1]: must be a whole number of at least 1, not 'x'",
        ),
        (
            "epochs: 1\nmodel: {name: rnn, rnn: {hidden: x}}\n",
            f"run.yaml:2: model.rnn: unknown key; allowed: {KEYS}, cell, hidden, layers, bidirectional, dropout",
        ),
        (
            "epochs: 1\nmodel: &m\n  name: vit\n  dim: *m\n",
            "run.yaml:4: model.dim: must be a whole number of at least 1, not a mapping",
        ),
    ],
)
def test_a_file_that_is_refused(text: str, problem: str) -> None:
    assert problems(text) == [problem]


def test_every_problem_is_reported_at_once() -> None:
    text = "epochs: 0\noptimizer:\n  name: adam\n  lr: -1\n  beta: [0.9, 0.99]\nmodel: mpl\n"
    assert problems(text) == [
        "run.yaml:1: epochs: must be a whole number of at least 1 or null, not 0",
        "run.yaml:4: optimizer.lr: must be a number above 0, not -1",
        "run.yaml:5: optimizer.beta: unknown key; allowed: name, lr, betas, eps, amsgrad, weight_decay, groups "
        "(did you mean 'betas'?)",
        "run.yaml:6: model: must be one of mlp, convnet, resnet18, rnn, vit, conv3d, seq2seq, gpt or FILE.py:NAME "
        "of your own, not 'mpl' "
        "(did you mean 'mlp'?)",
    ]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: [1,\n  2", "2:4", "while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("a: b: c", "1:5", "mapping values are not allowed here"),
        ("a:\n\tb: 1", "2:1", "while scanning for the next token, found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2", "2:1", "expected a single document in the stream, but found another document"),
        ("a: *b", "1:4", "found undefined alias 'b'"),
        ("a: 1\nb: \x07", "2:4", r"the character '\x07' is not allowed"),
        (
            "<<: 3",
            "1:5",
            "while constructing a mapping, expected a mapping or list of mappings for merging, but found scalar",
        ),
        ("a: !mine 3", "1:4", "the tag !mine is not supported; write plain values"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "1:4",
            "the tag !!python/object/apply:os.system is not supported; write plain values",
        ),
        ("a: !!set {b, c}", "1:4", "the tag !!set is not supported; write plain values"),
        ("a: !!int b", "1:4", "b is not a valid int"),
        ("a: !!int 1_000", "1:4", "1_000 is not a valid int"),
        ("a: !!bool yes", "1:4", "the boolean yes is not a valid bool"),
        (f"a: !!float {':'.join('1' * 200)}", "1:4", f"{'1:' * 30}... is not a valid float"),
        (f"a: {'9' * 5000}", "1:4", f"{'9' * 60}... is not a valid int"),
        (f"a: 0x{'f' * 5000}", "1:4", f"0x{'f' * 58}... is not a valid int"),
    ],
)
def test_invalid_yaml(text: str, where: str, what: str) -> None:
    assert problems(text) == [f"run.yaml:{where}: not valid YAML: {what}"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 200_000, "run.yaml:1:51: not valid YAML: nested too deeply"),
        ("- " * 100_000, "run.yaml:1:101: not valid YAML: nested too deeply"),
        (
            "".join(f"k{n}: 1\n" for n in range(40_000)),
            "run.yaml:5000:8: not valid YAML: more than 10,000 keys and values",
        ),
        (
            "a: &a [1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmno")),
            "run.yaml:1:1: not valid YAML: aliases repeat more than 10,000 keys and values",
        ),
        (
            "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [*{a}, *{a}]}}\n" for a, b in pairwise("abcdefghijklmno")),
            "run.yaml:1:1: not valid YAML: aliases repeat more than 10,000 keys and values",
        ),
        ("# a comment\n" * 100_000, "run.yaml: larger than 1,048,576 bytes, and so no configuration"),
    ],
    ids=["brackets", "dashes", "keys", "aliases", "merge keys", "bytes"],
)
def test_there_is_an_end_to_what_a_file_may_hold(text: str, problem: str) -> None:
    assert problems(text) == [problem]


def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"/dev/zero: larger than 1,048,576 bytes"):
        load_config("/dev/zero")


def test_an_override_is_bounded_like_a_file() -> None:
    assert problems("epochs: 1", "seed=" + "[" * 60) == [f"override seed={'[' * 60}: not valid YAML: nested too deeply"]
    dotted = ".".join("a" * 30_000)
    assert "a: unknown key" in problems("epochs: 1", f"{dotted}=1")[0]


def test_of_many_problems_the_first_are_told_and_the_others_counted() -> None:
    told = problems("".join(f"k{n}: 1\n" for n in range(1_000)))
    assert len(told) == 21
    assert told[0].startswith("run.yaml:1: k0: unknown key")
    assert told[-1] == "and 980 more"


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere.yaml", "nowhere.yaml: no such file"),
        ("folder", "folder: cannot be read: Is a directory"),
        ("latin1.yaml", "latin1.yaml:2: not UTF-8; save the file as UTF-8"),
        ("pipe", "pipe: the file is empty; give at least epochs or steps"),
        ("a\0b", r"a\x00b: cannot be read: embedded null byte"),
        ("a\nb", r"a\nb: no such file"),
    ],
)
def test_a_file_that_cannot_be_read(path: str, problem: str) -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")  # that nobody writes to
    Path("latin1.yaml").write_bytes("epochs: 1\nname: é".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == problem


def test_only_a_config_or_a_config_error_comes_out_of_any_text() -> None:
    """Random documents of keys and values that mean something, or used to; the seed is fixed, so a failure repeats."""
    keys = [
        *RunConfig.model_fields,
        "lr",
        "hidden",
        "workers",
        "min",
        "<<",
        "on",
        "? [a]",
        "*a",
        '"\\ud800"',
        "a b",
        "=",
    ]
    values = [
        "1",
        "x",
        "",
        "~",
        ".nan",
        "adam",
        "vit",
        "[1, 2]",
        "{name: rnn, rnn: 1}",
        "{name: [[]]}",
        "{min: 0}",
        "*a",
    ]
    values += [
        "&a {b: *a}",
        "!!float ''",
        "!!null [1]",
        "!x y",
        "'",
        "2026-13-45",
        "{<<: *a}",
        r'"\ud800\0"',
        "\x85",
        "|",
    ]
    draw = random.Random(0)
    for _ in range(300):
        lines = [
            f"{draw.choice(['', '  '])}{draw.choice(keys)}: {draw.choice(values)}" for _ in range(draw.randrange(4))
        ]
        overrides = [f"{draw.choice(keys)}.{draw.choice(keys)}={draw.choice(values)}"] * draw.randrange(2)
        try:
            run = read("\n".join(["epochs: 1", *lines]), *overrides)
        except ConfigError as error:
            assert all(line.isprintable() and line for line in str(error).split("\n"))  # noqa: PT017
        else:
            assert read(dump_config(run)) == run
