"""The YAML recipe: schema, loading, dotted overrides, snapshot."""

from rrhf_peft.recipe.loading import json_schema, load_recipe, make_recipe, read_recipe, recipe_text
from rrhf_peft.recipe.schema import (
    AdapterSection,
    CompareSection,
    DataSection,
    EngineSection,
    ModelSection,
    OnlineSection,
    Recipe,
    RRHFObjective,
    SFTObjective,
    TrainingSection,
    takes_from_base,
)
from rrhf_peft.recipe.stages import (
    CandidatesSection,
    EndpointSection,
    EvaluationSection,
    RoundsSection,
    SamplingSection,
    ScoringSection,
)

__all__ = [
    "AdapterSection",
    "CandidatesSection",
    "CompareSection",
    "DataSection",
    "EndpointSection",
    "EngineSection",
    "EvaluationSection",
    "ModelSection",
    "OnlineSection",
    "RRHFObjective",
    "Recipe",
    "RoundsSection",
    "SFTObjective",
    "SamplingSection",
    "ScoringSection",
    "TrainingSection",
    "json_schema",
    "load_recipe",
    "make_recipe",
    "read_recipe",
    "recipe_text",
    "takes_from_base",
]
