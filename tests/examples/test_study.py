"""The study of smoothing: that it measures what it says, goes on after a stop, and stars what its lines show."""

import json

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from examples.study import tasks
from examples.study import train as study
from examples.study.measures import Difference, fit_temperature, paired, spread
from examples.study.report import MEASURES, NONE, USUAL, Setting, compare, distillation_table, judge, table_of
from examples.study.tasks import Part, digits_task, scaled_stats
from examples.study.train import CONVENTIONS, SETTINGS, Results, app, read_lines

pytestmark = pytest.mark.usefixtures("optax_promotion", "one_thread")

NAMES = list(MEASURES)


# --- Measures -------------------------------------------------------------------------------------------------------


def test_paired_differences_are_those_of_scipy():
    values, baseline = np.random.default_rng(0).standard_normal((2, 7))
    expected = stats.ttest_rel(values, baseline)
    interval = expected.confidence_interval(0.95)
    wanted = Difference((values - baseline).mean(), interval.low, interval.high, expected.pvalue)
    np.testing.assert_allclose(paired(values, baseline), wanted, rtol=1e-12)


@pytest.mark.parametrize(("differences", "p"), [([0.0, 0.0], 1.0), ([0.5, 0.5], 0.0)])
def test_equal_differences_have_no_interval(differences, p):
    assert paired([1 + d for d in differences], [1.0, 1.0]) == Difference(differences[0], *(2 * [differences[0]]), p)


@pytest.mark.parametrize(("values", "baseline"), [([1.0], [1.0]), ([1.0, 2.0], [1.0])])
def test_what_has_no_pair_is_refused(values, baseline):
    with pytest.raises(ValueError, match="pass two or more pairs, one for each seed"):
        paired(values, baseline)


def test_a_temperature_at_the_end_of_its_range_is_found():
    assert fit_temperature(lambda t: t) == pytest.approx(0.05, rel=1e-3)
    assert fit_temperature(lambda t: -t) == pytest.approx(20, rel=1e-3)


def test_spread_does_not_depend_on_scale_and_place():
    random = np.random.default_rng(0)
    labels = random.integers(5, size=100)
    features = random.standard_normal((100, 3)) + labels[:, None]
    assert spread(4 * features - 1024, labels) == pytest.approx(spread(features, labels), rel=1e-9)
    assert spread(np.eye(5)[labels], labels) == 0


def test_a_temperature_divides_the_logits():
    random = np.random.default_rng(0)
    features, weight, bias = (random.standard_normal(shape, np.float32) for shape in ((6, 4), (4, 5), (5,)))
    labels = random.integers(5, size=6)
    # Powers of 2, so that nothing is rounded on the way.
    scaled = scaled_stats((8 * weight, 8 * bias), Part(features, labels), 8.0)
    plain = scaled_stats((weight, bias), Part(features, labels), 1.0)
    for name, values in plain._asdict().items():
        np.testing.assert_array_equal(getattr(scaled, name), values, err_msg=name)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fifth_is_mislabelled(seed):
    clean, wrong = (digits_task("", train_rows=400, epochs=1, mislabelled=count).data(seed) for count in (0, 80))
    assert (clean.train.labels != wrong.train.labels).sum() == 80
    assert {*wrong.train.labels} == set(range(10))
    np.testing.assert_array_equal(clean.train.inputs, wrong.train.inputs)
    np.testing.assert_array_equal(clean.test.labels, wrong.test.labels)
    # What is trained on has the wrong labels too: a batch is rows of the training part.
    (inputs, labels), *_ = wrong.batches(1)
    rows = [np.flatnonzero((wrong.train.inputs == image).all(axis=1))[0] for image in inputs]
    np.testing.assert_array_equal(labels, wrong.train.labels[rows])


# --- Tables ---------------------------------------------------------------------------------------------------------


def lines_of(shift, noise=0.0, seeds=5):
    """Return lines of a task in which each smoothing shifts every measure, with a noise that differs by seed."""
    random = np.random.default_rng(0)
    return [
        {
            "task": "made",
            **setting._asdict(),
            "seed": seed,
            **{
                name: 0.5 + 0.01 * seed + (shift + noise * random.standard_normal()) * bool(setting.smoothing)
                for name in NAMES
            },
        }
        for setting in (*SETTINGS, *CONVENTIONS)
        for seed in range(seeds)
    ]


def test_a_difference_in_every_seed_is_shown():
    compared = compare(lines_of(0.125, noise=0.001))
    assert [judge(compared, name) for name in ("accuracy", "nll")] == ["better", "worse"]
    compared = compare(lines_of(-0.125, noise=0.001))
    assert [judge(compared, name) for name in ("accuracy", "nll")] == ["worse", "better"]


def test_a_difference_within_the_noise_is_not_shown():
    compared = compare(lines_of(0.001, noise=1.0))
    assert {judge(compared, name) for name in NAMES} == {"not shown"}


def test_pairs_are_of_one_seed_in_whatever_order_the_lines_come():
    lines = lines_of(0.125)
    grid = table_of("", compare(lines[::-1]), ["accuracy"])
    assert grid.rows[0] == ["none", "0.5200"]
    assert sorted(map(tuple, grid.rows[1:])) == sorted(
        (str(setting), "+0.1250 ± 0.0000 *") for setting in (*SETTINGS[1:], *CONVENTIONS)
    )


def test_students_are_compared_at_one_temperature():
    def networks(seed):
        yield {"role": "student", "smoothing": 0.0, "temperature": 0, "accuracy": 0.25}
        for smoothing in (0.0, 0.1):
            yield {"role": "teacher", "smoothing": smoothing, "temperature": 0, "accuracy": 0.5 + smoothing}
            for t in (1, 2, 4, 8):
                accuracy = 0.5 - smoothing * t / 10 + 0.01 * seed
                yield {"role": "student", "smoothing": smoothing, "temperature": t, "accuracy": accuracy}

    grid = distillation_table([{"seed": seed, "networks": list(networks(seed))} for seed in range(3)])
    assert [row[2][:7] for row in grid.rows] == ["+0.1000", "-0.0100", "-0.0200", "-0.0400", "-0.0800", ""]
    assert grid.rows[-1] == ["student of labels", "0.2500", ""]


# --- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """A study of seconds: two settings of one task, and no distillation."""
    task = digits_task("few digits", train_rows=64, epochs=1)
    monkeypatch.setattr(study, "make_tasks", lambda *given: {"few": task})
    monkeypatch.setattr(study, "SETTINGS", (NONE, USUAL))
    monkeypatch.setattr(study, "CONVENTIONS", ())
    made = [{"role": "teacher", "smoothing": s, "temperature": 0, "accuracy": 0.5} for s in (0.0, 0.1)]
    made += [
        {"role": "student", "smoothing": s, "temperature": t, "accuracy": 0.5}
        for s in (0.0, 0.1)
        for t in (0, 1, 2, 4, 8)
    ]
    monkeypatch.setattr(study, "distilled", lambda epochs, seed: iter(made))


def run(*options):
    result = CliRunner().invoke(app, [*map(str, options)])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on(few, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- examples.study.train: begin -->\n<!-- examples.study.train: end -->\nafter\n")
    run("--seeds", 2, "--output", tmp_path)
    path = tmp_path / "results.jsonl"
    content = path.read_text()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 2 * 2 + 2
    path.write_text("".join(lines[:3]) + lines[3][:10])  # as a kill may leave it

    trained = []
    train = tasks.train
    monkeypatch.setattr(study, "train", lambda *given: trained.append(given[2:]) or train(*given))
    output = run("--seeds", 2, "--output", tmp_path, "--page", page)
    assert trained == [(1, "uniform", 0.1)]
    assert path.read_text() == content
    assert "Uniform smoothing of 0.1 against none, 2 seeds" in output
    assert f"{page}" in output.replace("\n", "")
    written = page.read_text()
    begin = "before <!-- examples.study.train: begin --> `python -m examples.study.train --seeds 2 --page "
    assert " ".join(written.split()).startswith(begin)
    assert "\n\nUniform smoothing of 0.1 against none, 2 seeds:\n" in written
    assert "| uniform 0.1 | " in written
    assert "](images/study_few-planes.png)" in written
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"study_few-strength.png", "study_few-planes.png"}

    trained.clear()
    run("--seeds", 2, "--output", tmp_path)
    assert not trained


def test_lines_of_another_length_of_training_are_not_taken(tmp_path):
    line = {"task": "few", "steps": 2, "convention": "uniform", "smoothing": 0.1, "seed": 0}
    results = Results(tmp_path / "results.jsonl")
    results.add(line)
    assert Results(tmp_path / "results.jsonl").has(line)
    assert not Results(tmp_path / "results.jsonl").has(line | {"steps": 3})


def test_only_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n" + '{"a": ')
    assert read_lines(path) == [{"a": 1}]
    assert path.read_text() == '{"a": 1}\n'


def test_one_seed_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["--seeds", "1", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "--seeds" in result.output


@pytest.mark.slow
def test_the_quick_study_runs(tmp_path, monkeypatch):
    """All tasks but the characters, for which there are no fonts here; test_characters.py has these."""
    make_tasks = study.make_tasks

    def without_characters(*given):
        return {name: task for name, task in make_tasks(*given).items() if name != "characters"}

    monkeypatch.setattr(study, "make_tasks", without_characters)
    output = run("--quick", "--seeds", 2, "--output", tmp_path, "--cache", tmp_path)
    titles = ("200 digits", "1000 digits", "400 digits, a fifth of them mislabelled", "a language model, 2048 tokens")
    for title in titles:
        assert title in " ".join(output.split())
    assert len(list(tmp_path.glob("*.png"))) == 7
    assert Setting("max_sup", 0.1) in {
        Setting(line["convention"], line["smoothing"]) for line in read_lines(tmp_path / "results.jsonl")
    }
