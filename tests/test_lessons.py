"What is stored in a notebook: explorers as pictures, and nothing that is missing or old."

import ast
import base64
import io
import json
import re

import nbformat
import pytest
from PIL import Image

import lessons
import rules

LESSONS = rules.lessons()
SHOWS = ("print", "print_wrapped", "fig_alt", "display", "record", "film")


def png() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def explorer(*outputs) -> tuple:
    "A cell with a slider above what it draws, and the state of these widgets."
    box = {"model_name": "VBoxModel", "state": {"children": ["IPY_MODEL_a", "IPY_MODEL_b"]}}
    slider = {"model_name": "IntSliderModel", "state": {"description": "head"}}
    drawn = {"model_name": "OutputModel", "state": {"outputs": list(outputs)}}
    view = {lessons.VIEW: {"model_id": "c"}, "text/plain": "interactive(...)"}
    cell = {"cell_type": "code", "outputs": [nbformat.v4.new_output("display_data", view)]}
    return cell, {"a": slider, "b": drawn, "c": box}


def drawing() -> dict:
    data = {"image/png": png(), "text/plain": 'Loss "now". across: step'}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def test_an_explorer_becomes_a_picture_and_a_sentence():
    cell, models = explorer(drawing())
    lessons.hold_still([cell], models)
    picture, sentence = cell["outputs"]
    alt = 'alt="The explorer as it begins. Loss &quot;now&quot;. across: step"'
    assert alt in picture["data"]["text/html"] and "image/png" not in picture["data"]
    assert sentence["text"] == "In the notebook you can change: head.\n"
    assert lessons.steady_output(picture) and lessons.steady_output(sentence)


def test_an_explorer_may_print():
    text = {"output_type": "stream", "name": "stdout", "text": "3 words\n"}
    cell, models = explorer(text)
    lessons.hold_still([cell], models)
    assert "".join(o["text"] for o in cell["outputs"]).startswith("3 words\nIn the notebook")


def test_a_fifth_picture_is_left_out():
    full = {"cell_type": "code", "outputs": [lessons.small_picture(png(), "x") for _ in range(4)]}
    cell, models = explorer(drawing())
    lessons.hold_still([full, cell], models)
    assert len(full["outputs"]) == 4
    assert [o["output_type"] for o in cell["outputs"]] == ["stream"]


def test_old_outputs_are_found(tmp_path, monkeypatch):
    path = tmp_path / "01_x.ipynb"
    cell = nbformat.v4.new_code_cell("print(1)")
    path.write_text(json.dumps(nbformat.v4.new_notebook(cells=[cell])), encoding="utf-8")
    made = {"outputs": [{"text": ["1\n"]}]}
    monkeypatch.setattr(lessons, "fresh", lambda path: ({"cells": [made]}, 0.0))
    with pytest.raises(ValueError, match=f"{cell['id']}.*--store 01_x"):
        lessons.check_stored(path)
    monkeypatch.setattr(lessons, "fresh", lambda path: ({"cells": [{"outputs": []}]}, 0.0))
    assert lessons.check_stored(path) == 0.0


def shows_something(cell) -> bool:
    "Does a statement of the cell's top level print, or its last one draw?"
    for node in cell.tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = getattr(node.value.func, "id", "")
            last = node is cell.tree.body[-1] and name.startswith(("draw_", "explore"))
            if name in SHOWS and (node.value.args or node.value.keywords) or last:
                return True
    return False


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_what_a_cell_shows_is_stored(lesson):
    empty = [
        cell.id
        for cell in lesson.code_cells
        if not cell.skipped and not cell.outputs and shows_something(cell)
    ]
    command = f"python tools/lessons.py --store {lesson.name}"
    assert not empty, f"{lesson.name}: no output is stored for cells {empty}: {command}"


def test_the_first_page_shows_what_its_prose_says():
    "It asserts next to nothing itself, so that a beginner reads no tests; its outputs are held here."
    start = next(lesson for lesson in LESSONS if lesson.name == "00_start")
    shown = "".join(text for cell in start.code_cells for text in rules.output_texts(cell))
    known = dict(re.findall(r"^(\w+) +the \w+ +\( ?(\d+)% sure\) +true: (?!nobody)", shown, re.M))
    invented = re.findall(r"^(\w+) +the \w+ +\( ?(\d+)% sure\) +true: nobody", shown, re.M)
    assert set(known) == {"Ada", "Felix", "Mabel"} and len(invented) == 3
    assert min(map(int, known.values())) > max(int(sure) for _, sure in invented)
    before, after = map(float, re.search(r"floor: ([\d.]+) nats .* before, ([\d.]+) now", shown).groups())
    assert after < before / 5
    assert "the next word: Gilbert" in shown
    assert "roses and moths" in shown and "I cannot tell you what is in it" in shown
    assert "this is always the likeliest word" in shown
