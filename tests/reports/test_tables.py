"""Tests of the result table and its Markdown."""

import io
import re

import pytest
from rich.console import Console

from mnclglf.reports.tables import (
    REPRESENTATIONS,
    Cell,
    mean_over_runs,
    percent,
    print_table,
    result_table,
    to_markdown,
    verdict,
)


def result(protocol="knn", representation="pretrained", top1=0.5, top5=0.9, **more):
    return {"protocol": protocol, "representation": representation, "split": "test", "top1": top1, "top5": top5, **more}


def filled(cell: Cell | None) -> Cell:
    """Returns the cell, which must not be that of a representation that was not run."""
    assert cell is not None
    return cell


def test_every_protocol_is_a_row_and_every_representation_a_column(evaluation):
    table = result_table(evaluation())
    assert table.representations == REPRESENTATIONS
    assert [row.title for row in table.rows] == [
        "Logistic regression, 10 labels per class", "Logistic regression, all labels", "k nearest neighbors"
    ]  # fmt: skip
    assert [filled(cell).top1 for cell in table.rows[2].cells] == pytest.approx([0.923, 0.72, 0.83])
    assert [filled(cell).best for cell in table.rows[1].cells] == [True, False, False]
    assert filled(table.rows[0].cells[1]).deviation == 0.021


def test_the_verdict_is_of_few_labels_and_says_where_pixels_win(evaluation):
    few = "Logistic regression, 10 labels per class"
    ours = "74.3% by the learned features"
    assert verdict(result_table(evaluation())) == [
        f"{few}: 74.3% right by the learned features, 54.0% by the untrained network's, 65.0% by raw pixels."
    ]
    pixels = [{**made, "top1": 0.9} if made["representation"] == "raw pixels" else made for made in evaluation()]
    lines = verdict(result_table(pixels))
    assert lines[0].endswith("90.0% by raw pixels.")
    assert lines[1:] == [f"{few}: raw pixels win, 90.0% against {ours}."]  # the other rows have 98.3 and 92.3


def test_no_verdict_without_both_sides_on_test_images(evaluation):
    for left_out in ("pretrained", "raw pixels"):
        assert verdict(result_table([made for made in evaluation() if made["representation"] != left_out])) == []
    assert verdict(result_table([{**made, "split": "validation"} for made in evaluation()])) == []
    assert verdict(result_table([{**made, "epoch": 3.0} for made in evaluation()])) == []


def test_order_of_the_results_does_not_matter(evaluation):
    assert result_table(evaluation()[::-1]) == result_table(evaluation())


def test_what_was_not_run_is_none_and_others_follow():
    table = result_table([result(), result("logistic", "PCA"), result("new_protocol", "untrained")])
    assert table.representations == (*REPRESENTATIONS, "PCA")
    assert [[cell is not None for cell in row.cells] for row in table.rows] == [
        [False, False, False, True],
        [True, False, False, False],
        [False, True, False, False],
    ]
    assert table.rows[2].title == "new_protocol"


def test_no_results_are_an_empty_table():
    assert result_table([]) == (REPRESENTATIONS, [])


def test_splits_are_rows_of_their_own():
    table = result_table([result(), {**result(top1=0.6), "split": "validation"}])
    assert [(row.title, filled(row.cells[0]).top1) for row in table.rows] == [
        ("k nearest neighbors", 0.5), ("k nearest neighbors (validation images)", 0.6)
    ]  # fmt: skip


def test_shares_of_labels_and_milestones_are_rows_of_their_own():
    results = [
        result("linear", top1=0.4),
        result("linear", top1=0.3, epoch=150.0),
        result("linear", top1=0.2, epoch=50.0),
        result("linear", top1=0.1, label_share=0.07),
        result("knn", top1=0.5, label_share=0.01),
    ]
    table = result_table([*results, result("logistic", top1=0.9, label_share=1.0, epoch=None)])
    paper = "Linear evaluation"
    assert [(row.title, filled(row.cells[0]).top1) for row in table.rows] == [
        ("Logistic regression, all labels", 0.9),
        ("k nearest neighbors, 1% of the labels", 0.5),
        (f"{paper}, all labels, after epoch 50", 0.2),
        (f"{paper}, all labels, after epoch 150", 0.3),
        (f"{paper}, all labels", 0.4),
        (f"{paper}, 7% of the labels", 0.1),
    ]


def test_the_papers_protocol_says_its_settings():
    settings = {"optimizer": "LARS", "epochs": 90, "batch_size": 256, "lr": 0.8, "momentum": 0.9, "seed": 3}
    (row,) = result_table([result("linear", settings=settings)]).rows
    assert row.details == "LARS, 90 epochs, batches of 256, lr 0.8"


def test_other_settings_are_rows_of_their_own_below_the_defaults():
    usual = {"optimizer": "LARS", "epochs": 90, "batch_size": 256, "lr": 0.8}
    results = [
        result("linear", top1=0.3, settings={**usual, "epochs": 6, "lr": 0.4}),
        result("linear", top1=0.4, settings=usual),
        result(top1=0.1, settings={"k": 5, "temperature": 0.07}),
        result(top1=0.2, settings={"k": 20, "temperature": 0.07}),
        result(representation="untrained", top1=0.05, settings={"k": 5, "temperature": 0.07}),
    ]
    rows = result_table(results).rows
    assert [(row.instead_of, filled(row.cells[0]).top1) for row in rows] == [
        ("", 0.2),
        ("", 0.4),
        ("instead of the default k 20", 0.1),
        ("instead of the default 90 epochs, lr 0.8", 0.3),
    ]
    assert rows[2].details == "k 5, vote temperature 0.07"
    assert "| k nearest neighbors (k 5, vote temperature 0.07; instead of the default k 20) |" in to_markdown(
        result_table(results)
    )
    assert filled(rows[2].cells[1]).top1 == 0.05


def test_means_do_not_mix_settings():
    runs = [[result(top1=top1, settings={"k": k}) for k, top1 in ((20, t), (5, t + 0.3))] for t in (0.1, 0.2)]
    first, second = mean_over_runs(runs)
    assert (first["top1"], second["top1"]) == pytest.approx((0.15, 0.45))


def test_one_of_a_kind_is_not_several():
    (row,) = result_table([result("linear", settings={"epochs": 1, "draws": 1, "subset": "philox"})]).rows
    assert row.details == "1 epoch, 1 draw of labels"


def test_means_are_over_the_runs_that_all_have_a_result():
    first = [
        result(top1=0.5, top5=0.7, settings={"k": 20, "step": 8, "note": "odd"}),
        result(top1=0.1, epoch=2.0),
        result("logistic"),
    ]
    second = [result(top1=0.6, top5=0.8, settings={"k": 20, "step": 9}), result(top1=0.2, epoch=2.0)]
    third = [result(top1=0.3, epoch=2.0), result(top1=0.7, top5=0.9, settings={"k": 20, "step": 8})]
    newest, milestone = mean_over_runs([first, second, third])
    # by hand: 0.5, 0.6, 0.7 lie 0.1 apart, so their deviation with n - 1 is 0.1
    assert (newest["top1"], newest["top5"], newest["deviation"]) == pytest.approx((0.6, 0.8, 0.1))
    assert newest["settings"] == {"runs": 3, "k": 20}
    assert (milestone["epoch"], milestone["top1"], milestone["deviation"]) == pytest.approx((2.0, 0.2, 0.1))
    assert "3 runs, k 20" in to_markdown(result_table([newest]))


def test_settings_that_differ_are_said_of_the_number():
    shared = {"k": 20, "train_images": 4000, "classes": 10}
    table = result_table(
        [
            result(settings={**shared, "step": 100}),
            result(representation="untrained", settings={**shared, "step": 0, "note": "not converged"}),
        ]
    )
    (row,) = table.rows
    assert row.details == "k 20, 4,000 training images"
    assert filled(row.cells[0]).notes == ("checkpoint after step 100",)
    assert filled(row.cells[1]).notes == ("checkpoint after step 0", "not converged")


def test_a_note_that_all_share_is_still_said_of_each():
    settings = {"k": 20, "note": "not converged"}
    table = result_table([result(settings=settings), result(representation="untrained", settings=settings)])
    assert table.rows[0].details == "k 20"
    assert [filled(cell).notes for cell in table.rows[0].cells[:2]] == [("not converged",)] * 2


def test_equal_results_are_both_best():
    table = result_table([result(), result(representation="untrained"), result(representation="raw pixels", top1=0.4)])
    assert [filled(cell).best for cell in table.rows[0].cells] == [True, True, False]


def test_markdown():
    results = [
        result("logistic_10_labels", top1=0.6123, top5=0.98765, deviation=0.0149, settings={"draws": 5}),
        result("logistic_10_labels", "untrained", 0.5, 0.9, settings={"draws": 5, "note": "a | b"}),
    ]
    assert to_markdown(result_table(results)) == (
        "| Top-1 / top-5, % | pretrained | untrained | raw pixels |\n"
        "|---|--:|--:|--:|\n"
        "| Logistic regression, 10 labels per class (5 draws of labels) | **61.2 ± 1.5** / 98.8 "
        "| 50.0 / 90.0 (a \\| b) | not run |\n"
    )


@pytest.mark.parametrize(("fraction", "text"), [(0, "0.0"), (1, "100.0"), (0.98765, "98.8"), (0.1, "10.0")])
def test_percent(fraction, text):
    assert percent(fraction) == text


def test_a_mean_never_mixes_subsets_drawn_in_different_ways():
    old = result("logistic_10_labels", settings={"draws": 5})
    new = result("logistic_10_labels", settings={"draws": 5, "subset": "philox"})
    with pytest.raises(ValueError, match=r"logistic_10_labels.*evaluate .*again"):
        mean_over_runs([[old], [new]])
    assert len(mean_over_runs([[old], [old]])) == len(mean_over_runs([[new], [new]])) == 1


def printed(results, **settings) -> str:
    file = io.StringIO()
    print_table(result_table(results), Console(file=file, **settings))
    return file.getvalue()


def test_a_pipe_gets_markdown(evaluation):
    assert printed(evaluation(), width=80) == to_markdown(result_table(evaluation())) + "\n"


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_terminal_gets_columns_that_fit(evaluation, width):
    shown = printed(evaluation(), width=width, force_terminal=True, no_color=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert max(map(len, plain.splitlines())) <= width
    assert "|---" not in plain
    words = " ".join(plain.replace("│", " ").split())
    for text in (
        "92.3 / 99.0",
        "74.3 ± 2.1",
        "k nearest neighbors: k 20, vote temperature 0.07, 4,000 training images",
    ):
        assert text in words


def test_only_what_was_run_is_a_column_of_the_terminal():
    marked = result("knn", "a[/b] [red]x", top1=0.123, settings={"k": 5, "note": "[/odd] [bold]"})
    shown = printed([marked], width=100, force_terminal=True, no_color=True)
    assert not [name for name in (*REPRESENTATIONS, "not run") if name in shown]
    for text in ("a[/b] [red]x", "[/odd] [bold]", "instead of the default k 20", "12.3"):
        assert text in shown
