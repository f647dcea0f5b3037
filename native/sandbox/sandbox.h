// System calls for processes and sandboxes that Python's standard library lacks.
#pragma once

int sv_close_range(unsigned int first, unsigned int last);
