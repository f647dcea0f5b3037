// Between the files of native/ring only.
#pragma once

#include "ring/ring.h"

// The thread runs until device->stop. -errno: there is none.
int sv_ring_begin_thread(struct sv_ring_device *device);
