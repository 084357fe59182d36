"""The report's sections on how to read it and on what was measured."""

from collections import Counter
from collections.abc import Iterable, Sequence

from evaluation.appendix import percent
from evaluation.document import Bullets, Heading, Table, Text, listed, plural
from evaluation.grid import load_grid
from evaluation.machine import ROOT
from evaluation.results import KEYS, Section, by_seed, number, title_of
from evaluation.statistics import ENOUGH_PROMPTS

GRID = ROOT / "evaluation/grids/pocket.yaml"  # the reported comparison
MACHINE = ("device", "cpu", "threads", "python", "torch", "diffusers", "peft", "commit")
BLUR = 2  # pixels from which a blur is mentioned
# parts of names in the shipped grids
PARTS = {
    "fast": "is a LoRA that learns at 4e-3 (the others at 1e-4 or 1e-3)",
    "guided": "a target that is predicted with guidance (prompt_scale)",
    "4": "four updates a step of what is learnt",
    "draws": "one update from four draws",
    "monotone": "timesteps that only fall",
    "after": "a first half of SDS",
}
# eps is the model's prediction of the noise, s the guidance scale
GRADIENTS = {
    "sds": "the guided eps minus the noise that was added (DreamFusion)",
    "csd": "eps with the prompt minus eps without (CSD)",
    "vsd": "the guided eps minus that of a LoRA that learns the renders with the prompt "
    "(ProlificDreamer)",
    "nfsd": "s (eps with the prompt minus eps without) plus a term towards real pictures (NFSD)",
    "bridge": "after a first half of SDS, eps with the prompt minus eps with a text of the renders "
    "(SDS-Bridge)",
    "ism": "the guided eps minus that at an earlier timestep of a DDIM inversion (LucidDreamer)",
    "lods-embedding": "eps with the prompt minus noise / s and (s - 1) / s times eps with a text "
    "embedding that learns the renders (LODS)",
    "lods-lora": "the same with a LoRA that learns them (LODS)",
}
LISTED = 40  # at most so many failed runs are named one by one


def progress(rows: Sequence[dict]) -> str:
    """What is said as long as a table with rows of GRID lacks others of it; "" afterwards."""
    if all(row["grid"] != GRID.stem for row in rows):
        return ""
    wanted = [run.identity for run in load_grid(GRID).runs]
    keys = [tuple(row.get(key, "") for key in wanted[0]) for row in rows]
    known = {tuple(identity.values()) for identity in wanted}
    failed = len({key for key, row in zip(keys, rows) if row["status"] != "ok"} & known)
    done = len(known & set(keys)) - failed
    if done == len(wanted):
        return ""
    if done + failed == len(wanted):
        return f"{plural(failed, 'run')} of {len(wanted)} failed, and the means are without them."
    old = sum(key not in known for key, row in zip(keys, rows) if row["grid"] == GRID.stem)
    return (
        f"The grid {GRID.stem} is not finished: {done} of its {len(wanted)} runs are in the table, "
        + (f"{plural(old, 'row')} there of settings that were replaced since, " if old else "")
        + "and nothing below is final."
    )


def overview(found: list[Section], replaced: int) -> list:
    """What was measured, on what, and what failed or is missing."""
    alone = len({s.grid for s in found}) == 1
    rows = []
    for s in found:
        steps = sorted({r.get("steps", "") for r in s.all_runs}, key=by_seed)
        rows.append(
            [
                title_of(s, alone),
                ", ".join(s.runs),
                str(len(s.prompts())),
                str(len(s.seeds())),
                ", ".join(steps) or "none",
                str(len(s.all_runs)),
                str(len(s.failed)),
                str(len(s.missing)),
            ]
        )
    header = ["canvas", "priors", "prompts", "seeds", "steps", "finished runs", "failed", "missing"]
    blocks = [Heading(2, "What was measured"), Table(header, rows)]
    prompts = sorted({p for s in found for p in s.prompts()})
    items = [f"Prompts: {'; '.join(prompts)}."]
    runs = [r for s in found for r in s.all_runs]
    for column in MACHINE:
        counts = Counter(r.get(column, "") or "not recorded" for r in runs)
        several = len(counts) > 1
        told = [f"{k} ({plural(n, 'run')})" if several else k for k, n in sorted(counts.items())]
        items.append(f"{column}: {', '.join(told) or 'no run'}.")
    if len({tuple(r.get(c, "") for c in ("device", "cpu", "threads")) for r in runs}) > 1:
        items.append("Runs were made on different machines: seconds compare within one only.")
    if replaced:
        items.append(f"{plural(replaced, 'row')} replaced by a later row of the same run.")
    for s in found:
        lacking = Counter(name for name, _, _ in s.missing)
        if lacking:
            each = ", ".join(f"{name} {n}" for name, n in lacking.items())
            items.append(f"{title_of(s, alone)}, runs missing that other priors have: {each}.")
    blocks.append(Bullets(items))
    failed = [(*(r[k] for k in KEYS), r["status"]) for s in found for r in s.failed]
    if failed:
        told = [f"{' / '.join(r[:5])}: {r[5]}" for r in failed[:LISTED]]
        more = [f"and {len(failed) - LISTED} more"] if len(failed) > LISTED else []
        blocks.append(Text(f"{plural(len(failed), 'run')} failed (left out of the means):"))
        blocks.append(Bullets(told + more))
    return blocks


def method(found: Sequence[Section], judge: Iterable[dict] | None) -> list:
    """The words of the report, and what its numbers mean; damages are of the judge's table."""
    names = {name for s in found for name in s.priors.values()}
    words = {word for n in names for word in n.split("-")}
    parts = [f"-{k} {what}" for k, what in PARTS.items() if k in words]
    numbers = sorted((w for w in words - set(PARTS) if w.replace(".", "").isdigit()), key=float)
    if numbers:
        parts.append(f"-{' and -'.join(numbers)} a guidance scale")
    known = [f"{n}, {what}" for n, what in GRADIENTS.items() if n in names]
    items = [
        "A prior is a way to make the gradient, a guidance of threestudio; a canvas is what is "
        "optimised: latents (2d), 3D Gaussians or a radiance field (nerf); settings are the "
        "prior's hyper-parameters, tuned on other prompts (below); true renders are of the real "
        "objects." + (f" In names of priors, {listed(parts)}." if parts else ""),
        *([f"What priors take the gradient to be: {'; '.join(known)}."] if known else []),
        "Object and colour accuracy: the share of views (of pictures, in 2D) that the judge takes "
        "for the object and the colour of the prompt. The judge is a classifier with an "
        "architecture, weights and training pictures of its own, of the same 20 objects. Chance is "
        "5 % and 12.5 %.",
        "Frechet distance (squared, as in FID): in the judge's features, between the views and "
        "true renders of the prompt; less is better. Small sets bias it upward, for all priors "
        "alike, and in 2D, with few pictures, more: the row of true renders is its floor."
        + "".join(f" {text}" for text in _damages(judge or ())),
        "Janus rate: of kinds with a front (some of the prompts only), the share of views from "
        "behind in which the judge sees the front; less is better. What shows no object has a low "
        "rate too, and damage makes fronts: read it beside object accuracy.",
        "Silhouette IoU: of the opacity against the true shape's, after the best turn "
        "about the vertical.",
        "Brackets are 95 % bootstrap intervals that draw prompts again, widened for their being "
        "few (evaluation/statistics.py). A difference is paired: over the prompts and seeds that "
        "both have. Bold is the best mean if the interval of its difference to the second excludes "
        "zero.",
        "The last column of the paired differences is a ratio: the geometric mean over the "
        "same pairs. Distances of prompts differ by factors, so a mean difference is mostly that "
        "of the hardest prompts; in the ratio all count alike. What is said in words goes by the "
        "differences.",
        f"Fewer than {ENOUGH_PROMPTS} prompts are not taken to show a difference. "
        "Intervals are not corrected for being many: of twenty differences that are "
        "nothing, one is expected to exclude zero, and up to three where one prompt outweighs the "
        "others.",
    ]
    if any(s.grid == GRID.stem for s in found):
        items.append(
            f"Of the grid {GRID.stem}, three quarters of the runs in 2D were in when the ratio was "
            "added, and half of all when the intervals were widened. The four priors of its "
            "radiance fields were chosen when most of its Gaussians were in: the three that the "
            "claim is against, VSD and LODS with the rate of the LoRA that had done best."
        )
    return [Heading(2, "How to read it"), Bullets(items)]


def _damages(judge: Iterable[dict]) -> list[str]:
    """What some distances look like: true renders that were blurred."""
    parts = [
        f"{number(r, 'frechet'):.0f} at {r['level']} ({percent(r, 'kind_accuracy')} % taken for "
        "the object)"
        for r in judge
        if r["test"] == "blurred" and r.get("frechet") and float(r["level"]) >= BLUR
    ]
    if not parts:
        return []
    return [
        "True renders blurred by a Gaussian of so many of 64 pixels have, over all prompts at once "
        f"and so on another scale, {listed(parts)}."
    ]
