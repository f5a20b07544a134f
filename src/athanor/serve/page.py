"""The page at `/`: chat in a browser, beside the API that it uses.

    GET   /             the page
    GET   /page/{name}  its parts
    GET   /report       the run's report.html, where there is one
    POST  /feedback     see `athanor.serve.feedback`, where the server has a run

Everything comes from this server: the page's Content-Security-Policy forbids the rest, and scripts inside its HTML too. What a
model says is only ever put in as text.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

from athanor.serve import feedback
from athanor.serve.guard import ApiError

_HERE = Path(__file__).with_name("page")
_KINDS = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
PARTS = tuple(sorted(path.name for path in _HERE.iterdir() if path.suffix in _KINDS))
PUBLIC = frozenset({"/", *(f"/page/{name}" for name in PARTS)})
"""Paths that hold nothing but the page itself, which asks for the key that the others want."""

_COMMON = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report has its styles inside and no script; `sandbox` holds it to that, whatever got into it.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; sandbox"


def run_of(model: Path | None) -> Path | None:
    """The run folder in which the model folder `model` lies (or which it is); None where there is none."""
    for folder in () if model is None else (model, model.resolve().parent):
        if (folder / "run.json").is_file():
            return folder
    return None


def install(app: FastAPI, run: Path | None = None) -> None:
    """Give `app` the page; with a run folder, the run's report too, and ratings of answers, which feedback.db there keeps."""
    parts = {name: (_HERE / name).read_bytes() for name in PARTS}
    html = (_HERE / "index.html").read_text(encoding="utf-8")

    def has_report() -> bool:
        return run is not None and (run / "report.html").is_file()

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        facts = {"report": has_report(), "feedback": run is not None}
        made = html
        for name, fact in facts.items():
            made = made.replace(f"{{{name}}}", "yes" if fact else "no")
        return Response(made, media_type="text/html", headers=_COMMON | {"Content-Security-Policy": _POLICY})

    @app.get("/page/{name}", include_in_schema=False)
    def part(name: str) -> Response:
        if name not in parts:
            raise ApiError(404, f"the page has no part {name[:80]!r}: it has {', '.join(PARTS)}")
        headers = _COMMON | {"Content-Type": _KINDS[Path(name).suffix], "Content-Security-Policy": _POLICY}
        return Response(parts[name], headers=headers)

    @app.get("/report", include_in_schema=False)
    def report() -> Response:
        if run is None or not has_report():
            raise ApiError(404, "this server has no report: serve a run that has one (`athanor report RUN` writes it)")
        return FileResponse(
            run / "report.html", media_type="text/html", headers=_COMMON | {"Content-Security-Policy": _REPORT_POLICY}
        )

    if run is not None:
        feedback.install(app, run / feedback.FILE)
