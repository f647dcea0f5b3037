// Between the files of native/ring only.
#pragma once

#include "ring/ring.h"

// One batch of a queue that runs, and all that follows from it.
void sv_ring_serve(struct sv_ring_device *device, unsigned int index);

// The thread runs until device->stop. -errno: there is none.
int sv_ring_begin_thread(struct sv_ring_device *device);
