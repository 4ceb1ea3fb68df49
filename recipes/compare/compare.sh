#!/usr/bin/env bash
# Train every objective of this folder on the same data, then print one table.
#
#   rrhf-peft demo
#   recipes/compare/compare.sh
#
# Arguments are changes to the recipes: model.* go to all of them, evaluation.* to the last one, others to training.
# Objectives whose run folder is finished are not trained again.
# Environment: OBJECTIVES="rrhf dpo" trains and compares only these; RUNS=folder writes elsewhere than runs/compare.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
runs="${RUNS:-runs/compare}"
read -r -a objectives <<< "${OBJECTIVES:-rrhf sft dpo ipo odpo simpo orpo cpo kto hinge plackett_luce pro}"

training=() evaluation=()
for change in "$@"; do
  case "$change" in
    model.*) training+=("$change"); evaluation+=("$change") ;;
    evaluation.*) evaluation+=("$change") ;;
    *) training+=("$change") ;;
  esac
done

policies="base: {}"
for objective in "${objectives[@]}"; do
  if [ ! -f "$runs/$objective/adapter_config.json" ]; then
    rrhf-peft train "$here/$objective.yaml" "training.output_dir=$runs/$objective" "${training[@]}"
  fi
  policies="$policies, $objective: {adapter: $runs/$objective}"
done
rrhf-peft evaluate "$here/evaluate.yaml" "evaluation.policies={$policies}" "evaluation.output=$runs/evaluation" \
  "${evaluation[@]}"
