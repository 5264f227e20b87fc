"""What ``make wheel`` adds to a wheel: the compiled core, where CHAIRLIFT_COMPILED is set."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledCore(BuildHookInterface[Any]):
    """A wheel with compiled modules is of one Python and one kind of machine."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and take the libraries into the wheel. An editable installation has `make fast`."""
        if version == "editable" or not os.environ.get("CHAIRLIFT_COMPILED"):
            return
        sys.path.insert(0, str(Path(self.root) / ".package"))
        from compile import build

        folder = Path(self.root) / "build" / "core"
        for library in build(folder, "3", trained=True):
            build_data["force_include"][str(library)] = str(library.relative_to(folder))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
