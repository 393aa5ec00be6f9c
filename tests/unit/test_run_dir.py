"""How a run's files are read, whatever a run or its end has left in them."""

from pathlib import Path

from megatron_opsd.reliability.run_dir import RunDir, read_jsonl, write_jsonl


def test_text_with_other_line_breaks_stays_one_line(tmp_path: Path) -> None:
    """Python's splitlines knows more of them than JSON escapes."""
    records = [{"response": f"a{mark}b"} for mark in ("\u2028", "\u2029", "\x85", "\n", "\x0c")]
    write_jsonl(tmp_path / "file.jsonl", records)
    assert read_jsonl(tmp_path / "file.jsonl") == records


def test_half_a_line_and_no_file(tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    assert read_jsonl(file) == []
    file.write_text('{"step": 1}\n{"st')
    assert read_jsonl(file) == [{"step": 1}]


def test_repeatable_metrics_leave_out_the_machine(tmp_path: Path) -> None:
    line = {"step": 1, "loss": 0.5, "tokens": 7}
    measured = {"seconds_total": 1.0, "memory_peak_gib": 2.0, "tokens_per_second": 7.0}
    write_jsonl(tmp_path / "metrics.jsonl", [line | measured])
    assert RunDir(tmp_path).repeatable_metrics() == [line]


def test_outcome_and_reason(tmp_path: Path) -> None:
    assert RunDir(tmp_path).read_outcome() == ("", "")
    RunDir(tmp_path).write_outcome("stopped", "step 3:\nthe run has collapsed: use another")
    assert RunDir(tmp_path).read_outcome() == ("stopped", "step 3: the run has collapsed: use another")
