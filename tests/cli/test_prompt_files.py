"""Files of prompts and answers: formats, refusals, resuming."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from chatglm.cli.prompt_files import AnswerFile, Prompt, read_prompts
from chatglm.errors import RequestError

PROMPTS = [Prompt("一", {}), Prompt("two", {}), Prompt("three", {})]
RUN = {"model": None, "temperature": 0, "stop": ("a",)}


def record(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer}


def open_file(path: Path, *, prompts: list[Prompt] = PROMPTS, overwrite: bool = False, **run: Any) -> AnswerFile:
    return AnswerFile(str(path), prompts, {**RUN, **run}, as_json=False, overwrite=overwrite)


def test_text_has_one_prompt_a_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff你好\r\n\n  \nhello\n".encode())
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "a.txt"))] == ["你好", "hello"]


def test_malformed_utf8_in_a_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\xffb\n")
    assert read_prompts(str(tmp_path / "a.txt"))[0].text == "a\ufffdb"


def test_json_lines_are_strings_or_objects_whose_other_fields_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"a\\nb"\n\n{"id": 7, "prompt": "c"}\n', encoding="utf-8")
    assert read_prompts(str(tmp_path / "a.jsonl")) == [Prompt("a\nb", {}), Prompt("c", {"id": 7})]


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "line 2: not JSON"), ('{"text": "a"}', "line 2: an object with the keys text"), ("3", "line 2: int")],
)
def test_bad_json_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'"ok"\n{line}\n', encoding="utf-8")
    with pytest.raises(RequestError) as caught:
        read_prompts(str(tmp_path / "a.jsonl"))
    assert said in str(caught.value)


def test_missing_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.txt: cannot be read"):
        read_prompts(str(tmp_path / "none.txt"))


def test_text_output_has_one_answer_a_line(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    with open_file(out) as answers:
        for answer in ("a\nb", "c\\d", ""):
            answers.add(record(PROMPTS[answers.num_done].text, answer))
        answers.finish()
    assert out.read_text(encoding="utf-8") == "a\\nb\nc\\\\d\n\n"
    assert list(tmp_path.iterdir()) == [out]


def test_json_output_has_one_record_a_line(tmp_path: Path) -> None:
    with open_file(tmp_path / "out.jsonl") as answers:
        answers.add(record("一", "a\nb"))
        answers.finish()
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == record("一", "a\nb")


def test_finished_file_has_ordinary_permissions(tmp_path: Path) -> None:
    with open_file(tmp_path / "out.txt") as answers:
        answers.finish()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "out.txt").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def interrupted(out: Path, *, half_line: str = "") -> None:
    with open_file(out) as answers:
        answers.add(record("一", "1"))
        answers.add(record("two", "2"))
    part = out.with_name(out.name + ".part")
    part.write_text(part.read_text(encoding="utf-8") + half_line, encoding="utf-8")


@pytest.mark.parametrize("half_line", ["", '{"prompt": "thr', '{"prompt": "three", "answer": ""}'])
def test_interrupted_run_goes_on_after_its_last_whole_answer(half_line: str, tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    interrupted(out, half_line=half_line)
    assert not out.exists()
    with open_file(out) as answers:
        assert (answers.is_resumed, answers.num_done) == (True, 2)
        answers.add(record("three", "3"))
        answers.finish()
    assert out.read_text() == "1\n2\n3\n"


def test_other_settings_do_not_go_on_with_a_begun_run(tmp_path: Path) -> None:
    interrupted(tmp_path / "out.txt")
    with pytest.raises(RequestError, match=r"begun with temperature 0, now it is 1[\s\S]*--overwrite"):
        open_file(tmp_path / "out.txt", temperature=1)


def test_other_prompts_do_not_go_on_with_a_begun_run(tmp_path: Path) -> None:
    interrupted(tmp_path / "out.txt")
    with pytest.raises(RequestError, match=r"other prompts \(from prompt 2 on\)"):
        open_file(tmp_path / "out.txt", prompts=[PROMPTS[0], PROMPTS[2]])
    with pytest.raises(RequestError, match="other prompts"):
        open_file(tmp_path / "out.txt", prompts=PROMPTS[:1])


def test_existing_file_is_not_touched_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "out.txt").write_text("old")
    with pytest.raises(RequestError, match=r"exists already[\s\S]*--overwrite"):
        open_file(tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "old"


def test_overwrite_begins_anew_and_keeps_the_old_file_until_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    interrupted(out)
    out.write_text("old")
    with open_file(out, overwrite=True) as answers:
        assert answers.num_done == 0
        for prompt in PROMPTS:
            answers.add(record(prompt.text, "x"))
        assert out.read_text() == "old"
        answers.finish()
    assert out.read_text() == "x\nx\nx\n"


def test_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be written"):
        open_file(tmp_path / "none" / "out.txt")


def test_without_a_file_answers_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with AnswerFile(None, PROMPTS, RUN, as_json=False, overwrite=False) as answers:
        answers.add(record("一", "a\nb"))
        answers.finish()
    assert capsys.readouterr().out == f"a\\nb{os.linesep}"
