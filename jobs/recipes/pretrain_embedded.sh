#!/usr/bin/env bash
# Pre-train a backbone as the embedded one was: about an hour on two cores. A stage that is there already is not run again.
#   jobs/recipes/pretrain_embedded.sh DIR_OF_THE_CORPUS
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python} CORPUS=${1:?the folder with eltec_novels.txt.gz and classic_books.txt.gz}

[ -d build/skills ] || $PYTHON jobs/make_skills.py --corpus "$CORPUS"/{eltec_novels,classic_books}.txt.gz --rows 60000 --out build/skills

FROM="backbone.init=random"
stage() {  # NAME RECIPE STEPS SEED [override...]
    local out=build/pretrained/$1
    [ -d "$out/backbone" ] ||
        $PYTHON jobs/pretrain.py "jobs/recipes/$2.yaml" "$FROM" train.max_steps="$3" train.seed="$4" "${@:5}" --out "$out"
    FROM="backbone={name: $out/backbone}"
}
# The rows that a stage sees are drawn anew: with one seed for all, the second stage would meet the rows of the first again.
stage 1-opinion pretrain_embedded_first 400 1 "mixture.weights={own/opinion: 1}"
stage 2-opinion-signs pretrain_embedded_first 700 2 "mixture.weights={signs/opinion: 1, own/opinion: 0.3}"
stage 3-agreement pretrain_embedded_first 400 3 "mixture.weights={own/agreement: 1, signs/opinion: 0.12}"
stage 4-agreement-signs pretrain_embedded_first 1200 4 "mixture.weights={signs/agreement: 1, own/agreement: 0.2, signs/opinion: 0.35}"
stage 5-both pretrain_embedded_first 900 5 "mixture.weights={signs/opinion: 1, signs/agreement: 0.6, own/opinion: 0.2, own/agreement: 0.1}"
stage 6-all pretrain_embedded 1200 6
