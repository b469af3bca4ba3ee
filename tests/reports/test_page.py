"""Tests of the report page for whole, partial, hostile and damaged run directories."""

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mnclglf.methods import METHODS, Method
from mnclglf.reports import page as html
from mnclglf.reports.page import Picture, progress, speed_lines, state_line, write_report
from mnclglf.reports.run_files import RunFiles, read_arrays, read_run, read_views
from mnclglf.reports.series import collect
from mnclglf.runs.metrics import read_records

FILES = ["config.json", "environment.json", "metrics.jsonl", "evaluation.json", "views.npz"]


class Page(HTMLParser):
    """Parser for the text and attributes of a page; fails on unclosed tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.attributes, self.open = "", [], []
        self.source = path.read_text()
        self.feed(self.source)
        assert self.open == []
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in {"meta", "img", "source", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + " "


@pytest.fixture
def real_pictures() -> None:
    """Requests that pictures are drawn."""


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the pictures, which take two seconds per page, unless the test asks for `real_pictures`."""
    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr(html, "_picture", lambda _: Picture("", ""))


def report(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path)


def test_a_whole_run(make_run):
    page = report(make_run())
    assert page.source.startswith("<!doctype html>")
    for words in (
        "mnclglf on mnist5k", "recipe quick", "seed 0", "self-supervised pre-training", "without seeing their labels",
        "Finished: 468 of 468 steps, 12 epochs.", "It is not the paper's recipe", "measured on this run",
        "92.3", "72.0", "83.0", "± 2.1", "Guessing among 10 classes gives 10.0", "queue_size 16384", "loader_threads",
        "torch 2.14.1", "commit not set", "images / s", "crop_scale 0.2, 1",
    ):  # fmt: skip
        assert words in page.words
    assert "Not measured yet" not in page.words
    assert not list(make_run().glob(".*"))


def test_it_needs_nothing_beside_it(make_run, add_pictures, real_pictures):
    run = make_run()
    add_pictures(run)
    page = report(run)
    links = [value for _, name, value in page.attributes if name in {"src", "srcset", "href"}]
    embedded = [link for link in links if not link.startswith("#")]  # the others are parts of a drawing
    # Views, light and dark; 2 queries, each with 2 x 3 neighbors; 2 moments of 6 pairs; 3 views with 6 combinations.
    assert len(embedded) == 2 + 2 * (1 + 6) + 2 * 12 + 3 * (1 + 6)
    for link in embedded:
        kind, data = link.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert not re.search(r"https?://|@import|<link|<script src|url\((?!#|\$)", page.source)
    assert all(value for tag, name, value in page.attributes if tag == "img" and name == "alt")
    assert "prefers-color-scheme: dark" in page.source
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("missing", FILES)
def test_each_file_may_be_missing(make_run, missing):
    run = make_run()
    (run / missing).unlink()
    page = report(run)
    assert {"evaluation.json": "Not measured yet", "metrics.jsonl": "Nothing logged yet"}.get(
        missing, f"There is no {missing}"
    ) in page.words


def test_it_opens_with_pictures_and_says_what_they_show(make_run, add_pictures):
    run = make_run()
    add_pictures(run)
    page = report(run)
    words = page.words
    order = ["10 labels per class: 74.3% right", "What the encoder finds alike", "A map of the test images",
             "Are the features any good?", "mistaken for", "How training went", "What the queue returned",
             "What the network sees", "What each combination of patches sees"]  # fmt: skip
    places = [words.index(text) for text in order]
    assert places == sorted(places)
    marks = [value.split()[1] for tag, name, value in page.attributes if name == "class" and value.startswith("mark ")]
    first = ["right", "right", "wrong", "wrong", "right", "right"]  # of query 0 by both representations
    assert marks[:6] == first
    assert marks[6:12] == ["right"] * 3 + ["wrong"] * 3
    assert "cat taken for <b>dog</b> (1 of 6)" in words
    assert "step 10" in words
    assert "step 400" in words
    assert "two patches are averaged into one: it has seen half of the view" in words


def test_without_a_gallery_the_views_come_first(make_run):
    words = report(make_run()).words
    assert words.index("What the network sees") < words.index("Are the features any good?")
    assert "What the encoder finds alike" not in words
    assert "What the queue returned" not in words


def test_many_classes_are_a_list_of_mistakes(make_run, add_pictures):
    run = make_run()
    add_pictures(run, classes=30)
    page = report(run)
    assert "class 28 taken for class 29 (1 of 6)" not in page.words  # the first five of equal ones
    assert "class 3 taken for class 4 (1 of 6)" in page.words
    assert "class, then answers" not in page.words


@pytest.mark.parametrize("name", ["gallery.npz", "queue.npz"])
def test_damaged_pictures_are_named(make_run, name):
    run = make_run()
    (run / name).write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match=f"{name}.*damaged"):
        report(run)


def test_the_time_of_a_step_is_shared_out(make_run):
    run = make_run()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = {"data_seconds": 0.01, "forward_seconds": 0.03, "backward_seconds": 0.05, "update_seconds": 0.01}
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line | seconds | {"roofline_fraction": 0.5}) + "\n" for line in lines)
    )
    environment = json.loads((run / "environment.json").read_text())
    parts = {"heads": 0.01, "convolutions, forward": 0.04}
    (run / "environment.json").write_text(json.dumps(environment | {"roofline_seconds": parts}))
    words = report(run).words
    for text in ("making the views: 10 ms, 10.0 %", "forward: 30 ms, 30.0 %", "backward: 50 ms, 50.0 %",
                 "convolutions, forward 40 ms 40.0 %", "heads 10 ms 10.0 %", "all parts 50 ms 50.0 %"):  # fmt: skip
        assert text in words


def test_without_results_it_says_what_makes_them(make_run):
    run = make_run()
    (run / "evaluation.json").write_text("[]")
    page = report(run)
    assert f"mnclglf knn {run}" in page.words
    assert f"mnclglf logistic {run}" in page.words


def test_an_empty_directory(tmp_path):
    assert "Nothing logged yet." in report(tmp_path).words


def test_files_that_are_there_but_empty_of_facts(tmp_path, real_pictures):
    (tmp_path / "config.json").write_text('{"optim": 3, "dataset": null}')
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n')
    (tmp_path / "evaluation.json").write_text('[{"protocol": "p", "representation": "r", "top1": 0, "top5": 1}]')
    np.savez(tmp_path / "views.npz", images=np.zeros((0, 4, 4, 3), np.uint8), views=np.zeros((3, 0, 3, 4, 4)),
             mean=np.zeros(3), std=np.ones(3))  # fmt: skip
    assert "4 steps logged; how many the run has is not known" in report(tmp_path).words


def test_an_interrupted_run(make_run):
    page = report(make_run(steps=170, recipe="paper"))
    assert "Not finished, interrupted or still training: 170 of 468 steps, epoch 4.4 of 12." in page.words
    assert "not the paper's recipe" not in page.words
    assert "checkpoint after step 468" in page.words


def test_results_of_an_earlier_checkpoint_are_marked(make_run):
    run = make_run()
    results = json.loads((run / "evaluation.json").read_text())["results"]
    results[0]["settings"]["step"] = 400
    (run / "evaluation.json").write_text(json.dumps({"version": 2, "results": results}))
    assert "of the checkpoint after step 400; the run has reached step 468 since" in report(run).words


def test_milestones_are_rows_and_no_cause_for_a_warning(make_run):
    run = make_run()
    results = json.loads((run / "evaluation.json").read_text())["results"]
    milestone = {**results[0], "protocol": "linear", "epoch": 3.0, "settings": {"step": 117, "classes": 10}}
    (run / "evaluation.json").write_text(json.dumps({"version": 2, "results": [*results, milestone]}))
    page = report(run)
    assert "Linear evaluation, all labels, after epoch 3 checkpoint after step 117" in page.words
    assert "has reached step" not in page.words


def of_method(run: Path, method: str) -> Path:
    """Returns the run with another method in its config.json."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "method": method}))
    return run


def assert_words_of(words: str, method: type[Method]) -> None:
    labeled, divided = method.needs_labels, "divide" in method.operators
    assert ("without seeing their labels" in words) == ("self-supervised" in words) == (not labeled)
    assert ("never to train" in words) == (not labeled)
    assert ("supervised training" in words) == ("from training with labels" in words) == labeled
    assert ("patches" in words) == divided
    assert ("dashed line" in words) == method.batch_candidates


@pytest.mark.parametrize("method", html.FORMER_METHODS)
def test_words_follow_from_the_method_in_runs_of_before(make_run, method):
    assert_words_of(report(of_method(make_run(), method)).words, METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_words_follow_from_what_the_method_says_of_itself(make_run, method):
    run = of_method(make_run(), "a_new_one")
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"method": METHODS[method].facts()}))
    words = report(run).words
    assert_words_of(words, METHODS[method])
    assert "batch_candidates" not in words


@pytest.mark.parametrize("method", html.FORMER_METHODS)
def test_what_is_known_of_runs_of_before_is_what_the_method_says(method):
    nothing = {"needs_labels": False, "divided_views": [], "batch_candidates": False}
    assert nothing | html.FORMER_METHODS[method] == METHODS[method].facts()


@pytest.mark.parametrize("said", [3, {}, {"divided_views": 2}, {"divided_views": ["a", -1, 9]}])
def test_a_method_that_says_nonsense_has_no_panels(make_run, said, real_pictures):
    run = make_run()
    (run / "environment.json").write_text(json.dumps({"method": said}))
    assert ("dashed line" in report(run).words) == (said == 3)


def test_captions_are_of_what_is_drawn(make_run):
    run = of_method(make_run(), "supervised")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = {"loss_s", "loss_m", "neighbor_agreement", "queue_fill"}
    records = [{key: value for key, value in line.items() if key not in left_out} for line in lines[:50]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = report(run)
    drawn = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    titles = ["Loss", "Feature spread", "Effective rank", "Gradient norm", "Learning rate", "Throughput"]
    assert drawn == [f"{title} over the steps" for title in titles]
    for absent in ("pale line", "terms", "neighbor", "queue fill", "never to train", "EMA"):
        assert absent not in page.words.split("Environment")[0] or absent == "neighbor", absent
    assert "pale line" in report(make_run()).words


def test_sentences_of_a_caption_have_a_space_between_them(make_run):
    source = report(make_run()).source
    captions = [" ".join(caption.split()) for caption in re.findall(r"<figcaption>(.*?)</figcaption>", source, re.S)]
    assert len([caption for caption in captions if ". " in caption]) == 2  # of the losses, of the signs of collapse
    assert not [caption for caption in captions if re.search(r"\.[A-Z]", caption)]


def test_notes_are_of_the_protocols_that_were_run(make_run):
    run = make_run()
    results = json.loads((run / "evaluation.json").read_text())["results"]
    for protocol, notes in (("knn", ()), ("linear", ("LARS",)), ("logistic", ("C is the inverse",))):
        result = {**results[0], "protocol": protocol, "settings": {}}
        (run / "evaluation.json").write_text(json.dumps({"version": 2, "results": [result]}))
        words = report(run).words
        assert tuple(note for note in ("LARS", "C is the inverse", "±") if note in words) == notes


def test_a_run_of_an_unknown_method_has_neutral_words(make_run):
    run = make_run()
    (run / "config.json").unlink()
    words = report(run).words
    assert "one run of training" in words
    assert not [claim for claim in ("supervised", "their labels", "patches", "dashed") if claim in words]


def test_results_of_other_settings_are_below_the_protocols_own(make_run):
    run = make_run()
    assert "With other settings" not in report(run).words
    results = json.loads((run / "evaluation.json").read_text())["results"]
    other = {**results[0], "top1": 0.321, "settings": {**results[0]["settings"], "k": 5}}
    (run / "evaluation.json").write_text(json.dumps({"version": 2, "results": [other, *results]}))
    first, second = report(run).words.split("With other settings")
    assert ("92.3" in first, "32.1" in first) == (True, False)
    assert "k nearest neighbors k 5" in second
    assert "instead of the default k 20" in second
    (run / "evaluation.json").write_text(json.dumps({"version": 2, "results": [other]}))
    assert report(run).words.count("k nearest neighbors k") == 1


def test_a_torn_last_line_is_skipped_and_others_are_counted(make_run):
    run = make_run()
    path = run / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 470, "lo')
    assert read_records(path) == (read_records(path)[0], 0)
    assert "could not be read" not in report(run).words
    path.write_text(whole.replace("\n", "\n{torn\n", 1) + '{"step": 470, "lo')
    page = report(run)
    assert "1 line of metrics.jsonl could not be read and is left out." in page.words
    assert "Finished: 468 of 468 steps" in page.words


def test_of_equal_steps_the_last_record_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 3}\n{"step": 2}\n{"step": 1, "loss": 9}\n')
    assert read_records(path)[0] == [{"step": 1, "loss": 9}, {"step": 2}, {"step": 3}]


def test_what_is_not_a_number_is_not_drawn(make_run, real_pictures):
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 468, "epoch": 12.0, "loss": NaN, "lr": Infinity, "images_per_second": "fast"}\n')
    assert "Finished" in report(run).words


def test_a_run_stopped_by_a_loss_that_is_not_finite(make_run):
    run = make_run(steps=100)
    (run / "nonfinite.json").write_text('{"step": 104, "terms": ["loss_s"], "images": [1, 2]}')
    assert "Stopped at step 104: a loss or a gradient was not finite" in report(run).words
    make_run(steps=468)  # trained on since
    assert "Finished: 468 of 468" in report(run).words


def test_text_from_files_is_escaped(make_run):
    run = make_run()
    attack = "<script>alert(1)</script>"
    (run / "config.json").write_text(
        json.dumps({"method": attack, "dataset": attack, "recipe": attack, attack: attack})
    )
    (run / "environment.json").write_text(json.dumps({attack: {attack: [attack]}}))
    results = [{"protocol": attack, "representation": attack, "top1": 0.5, "top5": 0.6, "settings": {"note": attack}}]
    (run / "evaluation.json").write_text(json.dumps(results))
    page = report(run)
    assert "<script" not in page.source
    assert attack in page.text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("environment.json", '"text"'),
        ("environment.json", "\udcff\udcfe"),
        ("evaluation.json", '[{"protocol": "knn"}'),
        ("evaluation.json", "[3]"),
        ("evaluation.json", '[{"protocol": "knn", "representation": "r", "top1": "high", "top5": 1}]'),
        ("evaluation.json", '[{"protocol": "knn", "representation": "r", "top1": 1, "top5": 1, "settings": 3}]'),
        ("evaluation.json", '[{"protocol": "knn", "representation": "r", "top1": 1, "top5": 1, "label_share": null}]'),
        ("evaluation.json", '[{"protocol": "knn", "representation": "r", "top1": 1, "top5": 1, "epoch": "last"}]'),
        ("metrics.jsonl", "no\nrecords\n"),
        ("nonfinite.json", "{"),
        ("views.npz", "no archive"),
    ],
)
def test_a_damaged_file_is_named(make_run, name, text):
    run = make_run()
    write_report(run)
    before = (run / "report.html").read_bytes()
    (run / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(str(run / name))):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_views_of_a_wrong_shape_are_refused(make_run, made_views):
    run = make_run()
    np.savez(run / "views.npz", **made_views(n=2) | {"images": np.zeros((3, 4, 4, 3), np.uint8)})
    with pytest.raises(ValueError, match=r"views\.npz is damaged: images \(3, 4, 4, 3\)"):
        write_report(run)
    np.savez(run / "views.npz", **made_views(n=2) | {"mean": np.array([object()])})
    with pytest.raises(ValueError, match=r"views\.npz is damaged"):
        write_report(run)


def test_no_directory_is_an_error(tmp_path):
    with pytest.raises(NotADirectoryError, match="give the run directory"):
        write_report(tmp_path / "nowhere")


def test_progress_counts_the_steps_of_all_epochs(make_run):
    reached = progress(read_run(make_run(steps=10)))
    assert reached is not None
    assert (reached.step, reached.total, reached.epochs, reached.finished) == (10, 468, 12, False)
    assert state_line(RunFiles(folder=Path("."))) == "Nothing logged yet."


def test_one_epoch_is_not_several():
    records = [{"step": 7, "epoch": 1.0}]
    run = RunFiles(folder=Path("."), metrics=collect([(records, 0)]), config={"optim": {"epochs": 1}})
    assert state_line(run) == "Finished: 7 of 7 steps, 1 epoch."


def test_the_share_of_the_roofline_is_explained_where_it_is_shown(tmp_path):
    for logged in ({}, {"roofline_fraction": 0.5}):
        record = {"step": 3, "images_per_second": 9.0} | logged
        (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        assert ("the least time that a step can take" in report(tmp_path).words) == bool(logged)


def test_speed_is_the_median_and_waiting_a_share():
    records = [
        {
            "step": 10,
            "images_per_second": 1.0,
            "data_wait_seconds": 99.0,
            "elapsed_seconds": 5,
            "roofline_fraction": None,
        },
        {
            "step": 20,
            "images_per_second": 100.0,
            "data_wait_seconds": 0.5,
            "elapsed_seconds": 6,
            "roofline_fraction": 0.5,
        },
        {"step": 30, "images_per_second": 200.0, "data_wait_seconds": 0.25, "elapsed_seconds": 3725},
        {"step": 31, "roofline_fraction": 0.75, "peak_memory_bytes": 3 * 2**29},
    ]
    run = RunFiles(folder=Path("."), metrics=collect([(records, 0)]), config={"optim": {"batch_size": 10}})
    assert speed_lines(run) == [
        ("Throughput, median", "100 images / s"),
        ("Share of the roofline, median", "62.5 %"),
        ("Peak memory", "1.5 GiB"),
        ("Waiting for data", "50.0 % of the time"),
        ("Time until the last record", "1 h 02 min"),
    ]
    assert speed_lines(RunFiles(folder=Path("."))) == []


@pytest.mark.parametrize("key", ["limit_share", "roofline_fraction"])
def test_the_roofline_fraction_is_read_by_its_former_name_too(tmp_path, key):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, key: 0.25}) + "\n")
    assert ("Share of the roofline, median", "25.0 %") in speed_lines(read_run(tmp_path))


def test_a_former_evaluation_is_shown_under_todays_names(make_run):
    run = make_run()
    former = {"representation": "pretrained", "top1": 0.5, "top5": 0.6}
    entries = [{**former, "protocol": name} for name in ("linear", "linear_lars")]
    (run / "evaluation.json").write_text(json.dumps(entries))
    words = report(run).words
    assert "Logistic regression, all labels" in words
    assert "Linear evaluation, all labels" in words


@pytest.mark.parametrize("read", [read_views, read_arrays])
def test_a_file_that_cannot_be_read_is_named_and_not_called_damaged(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "x.npz"
    path.symlink_to("/proc/self/mem")  # reading it fails with EIO
    with pytest.raises(OSError, match=r"Input/output error: '.*/x\.npz'"):
        read(path)
