// What the module _devices has: an engine and the kinds of devices that it serves.
#pragma once

#include "balloon/balloon.h"
#include "console/console.h"
#include "ring/ring.h"
#include "rng/rng.h"
