"""What graphfuse did to a model: every site, rewritten or refused, as data and for people.

    report = graphfuse.report(model)
    report.counts                   {"rms_norm": 65, "rope": 64, ...}
    report.refused                  the sites left as they were, each with its reason
    print(report)                   one line per kind of site: 32 equal layers are one line
    report.to_json("report.json")   also to_dict, to_text(details=True), to_markdown, to_html
    older.diff(report)              what changed

Of the engine this package knows nothing: it is filled with sites.
"""

from __future__ import annotations

from graphfuse.reporting.data import SCHEMA_VERSION, Report, Site, collapse

__all__ = ["SCHEMA_VERSION", "Report", "Site", "collapse"]
