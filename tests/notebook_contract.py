"""What papermill lets pass in a notebook and the project does not."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat


def code_of(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def faults(path: Path) -> list[str]:
    """Return what breaks the contract in a notebook's source, in words; an empty list where nothing does."""
    cells = code_of(path)
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    found = [] if len(tagged) == 1 else [f"{len(tagged)} cells are tagged parameters"]
    for cell in tagged:
        for line in ast.parse(cell.source).body:
            # A derived value keeps what it was derived from; an annotation hides the name from papermill.
            if not (isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)):
                found.append(f"parameters: {ast.unparse(line)} is no plain literal")
    for number, cell in enumerate(cells, start=1):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Try):
                found.append(f"cell {number}: an error is caught, and papermill would call it success")
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("exit", "quit", "sys.exit", "os._exit"):
                found.append(f"cell {number}: {ast.unparse(node)} ends the kernel, and papermill would call it success")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
                found.append(f"cell {number}: defines something; that belongs into the package")
        if cell.outputs or cell.execution_count is not None:
            found.append(f"cell {number}: has outputs")
    return found
