// What gcc calls in freestanding code.
#include "guest.h"

void *memset(void *to, int value, size_t length)
{
	void *at = to;

	if (!value && !((u64)to % 8) && !(length % 8)) {
		length /= 8;
		asm volatile("rep stosq" : "+D"(at), "+c"(length) : "a"(0ull) : "memory");
	} else {
		asm volatile("rep stosb" : "+D"(at), "+c"(length) : "a"(value) : "memory");
	}
	return to;
}

void *memcpy(void *to, const void *from, size_t length)
{
	void *at = to;

	asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(length)::"memory");
	return to;
}

int memcmp(const void *a, const void *b, size_t length)
{
	const u8 *left = a, *right = b;

	for (; length; length--, left++, right++)
		if (*left != *right)
			return *left - *right;
	return 0;
}
