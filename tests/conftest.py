"Before any test imports torch: its threads spin shortly, and so do those of the children."

import llm_course  # noqa: F401
