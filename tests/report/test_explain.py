"""explain(): which cuts are in use."""

from __future__ import annotations

import json
import re

from plain import compiled, picture, timesteps

import dcompile
from dcompile import MultiLevel


def test_all_cuts_in_use_are_marked() -> None:
    x, t = picture(), timesteps(4)[0]
    network = compiled(schedule=MultiLevel([(0, 2), (1, 6)]))
    found = dcompile.handle(network).explain(x, t)
    assert found.chosen == (0, 1)
    assert re.findall(r"▸(\d)", str(found)) == ["0", "1"]
    assert json.loads(json.dumps(found.as_dict()))["chosen"] == [0, 1]
    one = dcompile.handle(compiled(depth=1)).explain(x, t)
    assert one.chosen == (1,)
    assert re.findall(r"▸(\d)", str(one)) == ["1"]
