#!/usr/bin/env bash
# Reproduce figure 7 of the DINO paper (arXiv 2104.14294): entropy of the targets and KL divergence, with centering and
# sharpening, and with one of them alone. Three runs of 200 steps of `tiny`; the picture is OUT/report/curves.png.
#
#     bash benchmarks/collapse.sh IMAGES [OUT]
#
# The head has no BatchNorm, which would also center.
set -eu
images=$1 out=${2:-collapse}
train() {
    dino pretrain "$images" --preset tiny --set views.locals=2 --set heads.dino.batch_norm=false --steps 200 --no-report "$@"
}
train --out "$out/both"
train --out "$out/sharpening-only" --set losses.dino.targets.momentum=1.0
train --out "$out/centering-only" --set 'losses.dino.targets.temperature={kind="constant", value=0.1}'
dino report "$out/both" "$out/centering-only" "$out/sharpening-only" --out "$out/report" \
    --value dino/teacher_entropy --value dino/kl
