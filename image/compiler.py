"""Ends with an error where triton could not compile what it starts a kernel with: torch.compile would fail where it is needed."""

from triton.runtime.build import compile_module_from_src

SOURCE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&definition); }
"""

print("triton compiles:", compile_module_from_src(SOURCE, "probe").__name__)
