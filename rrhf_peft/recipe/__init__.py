"""The YAML recipe: schema, loading, dotted overrides, snapshot."""

from rrhf_peft.recipe.compare import CompareSection
from rrhf_peft.recipe.evaluation import EvaluationSection
from rrhf_peft.recipe.loading import json_schema, load_recipe, make_recipe, read_recipe, recipe_text
from rrhf_peft.recipe.objectives import RRHFObjective, SFTObjective, takes_from_base
from rrhf_peft.recipe.online import OnlineSection
from rrhf_peft.recipe.rounds import RoundsSection
from rrhf_peft.recipe.sampling import CandidatesSection, EndpointSection, SamplingSection
from rrhf_peft.recipe.schema import (
    AdapterSection,
    DataSection,
    EngineSection,
    ModelSection,
    Recipe,
    TrainingSection,
)
from rrhf_peft.recipe.scoring import ScoringSection

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
