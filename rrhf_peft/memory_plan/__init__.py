"""Recipe -> predicted peak memory: arithmetic on shapes, no weights loaded, no GPU needed."""

from rrhf_peft.memory_plan.plan import Item, MemoryPlan, plan_memory

__all__ = ["Item", "MemoryPlan", "plan_memory"]
