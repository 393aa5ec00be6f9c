"""The engine that writes the student's answers, and how it gets the student's weights."""
