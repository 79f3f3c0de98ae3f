"""`dino knn`: how well do the nearest images tell the class?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from dinocli import console
from dinocli.cli.options import FeatureFolder, Json, features_or_newest


def knn(
    k: Annotated[
        list[int] | None, typer.Option("--k", help="Neighbours that vote; may be repeated. 10 and 20 if absent.")
    ] = None,
    features: FeatureFolder = None,
    temperature: Annotated[float, typer.Option(min=1e-4, help="A vote weighs exp(similarity / temperature).")] = 0.07,
    json: Json = False,
) -> None:
    """Classify by the weighted vote of the nearest images in cosine similarity, as the paper does."""
    folder = features_or_newest(features)

    from dinocli.evals.knn import knn
    from dinocli.features import compared, read_splits

    train, test = compared(read_splits(folder))
    result = knn(train, test, k or [10, 20], temperature)
    if json:
        console.out_json(asdict(result))
        return
    how = (
        "each image by all others (leave-one-out)"
        if result.leave_one_out
        else f"by {result.neighbours} training images"
    )
    console.table(
        ["k", "top-1 %", "top-5 %"],
        [[str(s.k), f"{s.top1:.2f}", f"{s.top5:.2f}"] for s in result.scores],
        title=f"k-NN of {train.recipe.source}: {result.queries} images of {result.classes} classes, {how}",
    )
