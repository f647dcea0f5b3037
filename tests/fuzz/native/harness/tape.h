// The input of a target: guest memory from its front, every decision from its end.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

extern const uint8_t *fuzz_tape;
extern size_t fuzz_tape_left;

// What must hold whatever the input is.
#define CHECK(holds)                                                                       \
	do {                                                                               \
		if (!(holds)) {                                                            \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #holds);        \
			abort();                                                           \
		}                                                                          \
	} while (0)

static inline uint8_t next_byte(void)
{
	return fuzz_tape_left ? fuzz_tape[--fuzz_tape_left] : 0;
}

static inline uint16_t next_short(void)
{
	uint16_t low = next_byte();

	return (uint16_t)(low | next_byte() << 8);
}
