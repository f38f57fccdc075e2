"""Grading of answers to mathematical questions. It imports nothing else of plainrl, so that it can be used alone."""
