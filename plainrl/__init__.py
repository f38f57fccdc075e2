"""The machinery behind the scripts."""

from plainrl.startup import prepare_program

prepare_program()
