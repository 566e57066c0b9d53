"""docs/trust.md is what the records and the lists of defects say, and every defect has the test that it names."""

import trust_page
from test_promises import complaint

DEFECTS = trust_page.defects()


def test_the_page_holds_what_the_records_say() -> None:
    """Written by `make trust`, never by hand."""
    text = trust_page.PAGE.read_text(encoding="utf-8")
    for block, table in trust_page.blocks().items():
        assert text.split(f"<!-- {block}:begin -->\n")[1].split(f"\n<!-- {block}:end -->")[0] == table, (
            f"run `make trust` ({block})"
        )


def test_every_defect_has_its_test() -> None:
    """A defect whose test was renamed could come back unnoticed."""
    assert DEFECTS
    assert [why for one in DEFECTS if (why := complaint(trust_page.test_name(one["test"])))] == []
    for one in DEFECTS:
        assert one.keys() == {"area", "found_by", "what", "fixed", "test"}
        assert one["what"].endswith(".")
        assert one["fixed"].endswith(".")


def test_no_record_counts_more_survivors_than_there_were() -> None:
    """Records come from runs on several machines and by several hands; each makes sense by itself."""
    found = trust_page.records()
    assert len({one["name"] for one in found}) == len(found)
    for one in found:
        assert 0 <= one["survived"] <= (one["faults"] or one["inputs"]), one["name"]
        assert one["inputs"] >= 0, one["name"]
        assert one["seconds"] > 0, one["name"]


def test_every_surviving_mutant_is_explained() -> None:
    """A change that no test notices is either no fault, and the reason stands in surviving_mutants.toml, or a missing test."""
    survivors, reasons = trust_page.survivors(), trust_page.reasons()
    assert [one for one in survivors if not any(reason.explains(*one) for reason in reasons)] == []
    assert [reason for reason in reasons if not any(reason.explains(*one) for one in survivors)] == [], "needed no more"


def test_nine_of_ten_lines_are_run() -> None:
    """Of the parts that answers depend on, by the tests that CI runs."""
    (measured,) = [one for one in trust_page.records() if one["name"] == "coverage"]
    for part in ("models", "zoo", "inference", "metrics", "train"):
        counts = measured["details"]["parts"][part]
        assert counts["lines_covered"] / counts["lines"] >= 0.9, part
