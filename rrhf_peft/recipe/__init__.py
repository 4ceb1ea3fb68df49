"""The YAML recipe: schema, loading, dotted overrides, snapshot."""

from rrhf_peft.recipe.loading import json_schema, load_recipe, make_recipe, recipe_text
from rrhf_peft.recipe.schema import (
    AdapterSection,
    DataSection,
    EngineSection,
    ModelSection,
    Recipe,
    RRHFObjective,
    SFTObjective,
    TrainingSection,
)

__all__ = [
    "AdapterSection",
    "DataSection",
    "EngineSection",
    "ModelSection",
    "RRHFObjective",
    "Recipe",
    "SFTObjective",
    "TrainingSection",
    "json_schema",
    "load_recipe",
    "make_recipe",
    "recipe_text",
]
