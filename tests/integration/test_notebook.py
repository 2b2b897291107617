"""The notebook of the documents runs from its first cell to its last."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "infra" / "docs" / "pages" / "shop.ipynb"


@pytest.mark.slow
def test_the_notebook_goes_from_a_frame_to_a_list(ray_session):
    shared = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), shared)
    assert shared["result"].status == "ok"
    assert len(shared["top"]) == 10 and shared["top"]["title"].notna().all()
    assert len(shared["visitor"]) == 5 and len(shared["alike"]) == 3 and len(shared["reasons"]) > 0
    assert {"recray", "most popular"} <= set(shared["quality"].index)
