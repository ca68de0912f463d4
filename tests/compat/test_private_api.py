"""Private names of torch, diffusers and accelerate are used in compat/ only."""

from __future__ import annotations

import re
from pathlib import Path

import dcompile

PRIVATE = re.compile(
    r"torch\._(?!pytree|_file__|_version__)\w+"
    r"|from torch(\.\w+)*\._(?!pytree)\w+"
    r"|torch\.fx\.experimental"
    r"|_diffusers_hook|_hf_hook|_old_forward|_orig_mod\b|_compiled_call_impl|_local_tensor"
    r"|\._version\b|untyped_storage\(|\.node\.(expr|shape_env)\b|_make_wrapper_subclass"
)
# Names in docstrings and messages, which call nothing.
ALLOWED = {
    ("backends/inductor.py", "torch._inductor"),
}


def test_private_names_stay_in_their_room() -> None:
    package = Path(dcompile.__file__).parent
    found = []
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if name.startswith(("compat/", "passes/")):
            continue
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            match = PRIVATE.search(line)
            if match and (name, match.group()) not in ALLOWED:
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found, "move these into dcompile/compat:\n" + "\n".join(found)
