"""Weight signatures of two corruptions, taken from one network and put on others: what do they change on every axis?

    python benchmarks/beyond/signatures.py

For each of three seeds: a network (`start`) is trained for a while, and from there on clean images (`clean`), on images behind
glass, and on images of low contrast: the two corruptions of unlike kind to which clean networks lose most here. (Gaussian noise
was tried first. It costs them nothing, so its signature had nothing to give.) Their signatures go on

    clean       the network that they were taken against
    sibling     a clean network from the same start, trained with other batches and another learning rate
    pgd-at      a network that was trained against attacks from the same start
    stranger    a clean network from another seed's start, where nothing says that they should work

Alpha is 1 unless it is said; `16 levels` is the sum of both, quantised. Batch norms hold the published blend with the corrupted
networks' (so the latter's at alpha 1); where it is said they are kept as they were, or measured again on clean training images.
"""

from __future__ import annotations

from typing import Any

from common import APGD, EPS, NETWORK, ROBUST, SEEDS, Column, N, means, options, run, write

GLASS, CONTRAST = "glass-blur", "contrast"
SEVERITY = 5
FINE = {"epochs": 6, "lr": 0.1}
COLUMNS: list[Column] = [
    ("clean", "clean", "accuracy"),
    ("glass", f"{GLASS} {SEVERITY}", "accuracy"),
    ("contrast", f"{CONTRAST} {SEVERITY}", "accuracy"),
    ("robust", ROBUST, "robust_accuracy"),
    ("clean ECE", "clean", "ece"),
]


def patched(target: str, of: list[str], seed: int, label: str, **how: Any) -> dict[str, Any]:
    """A network with signatures on it."""
    roles = {"pre": f"start #{seed}", "clean": f"clean #{seed}", "target": target}
    members = list(dict.fromkeys([*roles.values(), *of]))
    make = {"name": "weight-signature", "of": members, **roles, **how}
    return {"name": f"{label} #{seed}", "make": make, "replicate_of": label}


def suite() -> dict[str, Any]:
    """Networks and patched networks of every seed."""
    models: list[dict[str, Any]] = []

    def trained(label: str, seed: int, defense: Any, recipe: dict[str, Any], **more: Any) -> None:
        network = {} if "start" in more else {"network": NETWORK}
        train = {"defense": defense, "seed": seed, "recipe": recipe, **network, **more}
        models.append({"name": f"{label} #{seed}", "train": train, "replicate_of": label})

    for seed in SEEDS:
        start = f"start #{seed}"
        trained("start", seed, "standard", {"epochs": 4, "lr": 0.1})
        trained("clean", seed, "standard", FINE, start=start)
        trained("sibling", seed + 100, "standard", {**FINE, "lr": 0.05}, start=start)
        for name in (GLASS, CONTRAST):
            corrupted = {**FINE, "augmentation": {"corruptions": [name], "severity": SEVERITY}}
            trained(name, seed, "standard", corrupted, start=start)
        trained("pgd-at", seed, "pgd-at", {**FINE, "eps": EPS, "attack_steps": 7}, start=start)
    for seed in SEEDS:
        clean, signatures = f"clean #{seed}", {"glass": [f"{GLASS} #{seed}"], "contrast": [f"{CONTRAST} #{seed}"]}
        both = [*signatures["glass"], *signatures["contrast"]]
        targets = {"sibling": f"sibling #{seed + 100}", "pgd-at": f"pgd-at #{seed}"}
        targets["stranger"] = f"clean #{(seed + 1) % len(SEEDS)}"
        for short, of in signatures.items():
            for alpha in (0.5, 1.0, 2.0):
                models.append(patched(clean, of, seed, f"clean + {alpha:g} {short}", alpha=alpha))
            for name, target in targets.items():
                models.append(patched(target, of, seed, f"{name} + {short}"))
                models.append(patched(target, of, seed, f"{name} + {short}, kept norms", norms="keep"))
            models.append(patched(targets["pgd-at"], of, seed, f"pgd-at + {short}, measured again", norms="recompute"))
        models.append(patched(clean, both, seed, "clean + both"))
        models.append(patched(clean, both, seed, "clean + both, 16 levels", levels=16))
    conditions = ["clean", *({"corruption": name, "severity": SEVERITY} for name in (GLASS, CONTRAST)), APGD]
    about = {
        "title": "Weight signatures",
        "description": "Signatures of two corruptions on networks that never saw them.",
    }
    return {
        "schema": 1,
        "name": "signatures",
        **about,
        "data": "mnist5k",
        "n": N,
        "models": models,
        "conditions": conditions,
    }


def main() -> None:
    """Run and write."""
    chosen = options(__doc__, "signatures")
    results, _ = run(suite(), chosen)
    names = list(dict.fromkeys(str(m["replicate_of"]) for m in results.models))
    lines, rows = means(results, names, COLUMNS)
    sizes = next(m["made"]["report"] for m in results.models if "16 levels" in str(m["name"]))
    about = (
        f"Robust: {ROBUST}, 40 steps. Glass and contrast at severity {SEVERITY}. One signature in 16 levels takes "
        f"{next(iter(sizes['signatures'].values()))['kilobytes']} kB, the network {sizes['kilobytes of the whole network']} kB."
    )
    write(chosen, suite(), [about, "", *lines], {"means": rows, "sizes": sizes})


if __name__ == "__main__":
    main()
