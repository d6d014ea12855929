#!/usr/bin/env bash
# Pre-train a backbone as the embedded one was: about two hours on two cores. A stage that is there already is not run again.
#   jobs/recipes/pretrain_embedded.sh       reads ../shared/data/corpus, as the recipes do; writes build/
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}

[ -d build/skills ] ||
    $PYTHON jobs/make_skills.py --corpus ../shared/data/corpus/{eltec_novels,classic_books}.txt.gz --rows 60000 --out build/skills
mkdir -p build/pretrained
# Windows of text in stages 7, 10 and 14 are twice as long. A list of a recipe is replaced whole, so overrides cannot say that.
sed 's/input_tokens: 64/input_tokens: 128/' jobs/recipes/pretrain_embedded.yaml > build/pretrained/long_windows.yaml
# Behind the matching heads two fifths of the rows ask what words two texts share.
sed -E -e '/(skills|own)\/contains,/s/0\.02/1.5/' -e '/skills\/same_words,/s/0\.02/0.7/' -e '/own\/same_words,/s/0\.02/1.0/' \
    -e '/skills\/shared_words,/s/0\.02/0.3/' jobs/recipes/pretrain_embedded.yaml > build/pretrained/matching.yaml
sed 's/input_tokens: 64/input_tokens: 128/' build/pretrained/matching.yaml > build/pretrained/matching_long_windows.yaml

FROM="backbone.init=random"
stage() {  # NAME RECIPE STEPS SEED [override...]
    local out=build/pretrained/$1
    # FROM is two overrides from the second stage on.
    # shellcheck disable=SC2086
    [ -d "$out/backbone" ] ||
        $PYTHON jobs/pretrain.py "$2" $FROM train.max_steps="$3" train.seed="$4" "${@:5}" --out "$out"
    FROM="backbone.init=pretrained backbone.name=$out/backbone"
}
FIRST=jobs/recipes/pretrain_embedded_first.yaml
# The rows that a stage sees are drawn anew: with one seed for all, the second stage would meet the rows of the first again.
stage 1-opinion $FIRST 400 1 "mixture.weights={own/opinion: 1}"
stage 2-opinion-signs $FIRST 700 2 "mixture.weights={signs/opinion: 1, own/opinion: 0.3}"
stage 3-agreement $FIRST 400 3 "mixture.weights={own/agreement: 1, signs/opinion: 0.12}"
stage 4-agreement-signs $FIRST 1200 4 "mixture.weights={signs/agreement: 1, own/agreement: 0.2, signs/opinion: 0.35}"
stage 5-both $FIRST 900 5 "mixture.weights={signs/opinion: 1, signs/agreement: 0.6, own/opinion: 0.2, own/agreement: 0.1}"
stage 6-all jobs/recipes/pretrain_embedded.yaml 1200 6
stage 7-long-windows build/pretrained/long_windows.yaml 320 7 train.learning_rate=6e-4
prepare() {  # NAME JOB SEED: a change of the weights between two stages
    local out=build/pretrained/$1
    # shellcheck disable=SC2086
    [ -d "$out" ] || $PYTHON "$2" jobs/recipes/pretrain_embedded.yaml $FROM train.seed="$3" --out "$out"
    FROM="backbone.init=pretrained backbone.name=$out"
}
# Embeddings from counts come once the skills are there: behind them the second skill was not learned.
prepare 8-embeddings jobs/make_embeddings.py 42
stage 9-all jobs/recipes/pretrain_embedded.yaml 1500 9
stage 10-long-windows build/pretrained/long_windows.yaml 320 10 train.learning_rate=6e-4
# What follows teaches to match words between texts, again one skill alone first (docs/pretraining.md).
prepare 11-matching-heads jobs/make_matching_heads.py 11
stage 12-contains $FIRST 250 12 "mixture.weights={own/contains: 1}" train.batch_size=64 train.lr_scheduler_type=linear train.warmup_ratio=0.05
stage 13-all build/pretrained/matching.yaml 500 13 train.learning_rate=7e-4 train.warmup_ratio=0.05
stage 14-long-windows build/pretrained/matching_long_windows.yaml 320 14 train.learning_rate=6e-4
