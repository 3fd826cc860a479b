"`python -m llm_course` is the command `llm-course`."
from llm_course.cli import app

app(prog_name="llm-course")
