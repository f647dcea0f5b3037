// The workload: runs at CPL3, at native speed wherever the guest runs. No globals but the table.
#include "guest.h"

// What the word at `index` of a disk or of memory holds; tests/support/guest.py knows it too.
static inline u64 pattern(u64 index, u64 seed)
{
	u64 x = (index + 1) * 0x9e3779b97f4a7c15ull ^ seed * 0xbf58476d1ce4e5b9ull;

	x ^= x >> 29;
	return x * 0x94d049bb133111ebull;
}

u64 user_fill(u64 *buffer, u64 words, u64 first, u64 seed)
{
	for (u64 i = 0; i < words; i++)
		buffer[i] = pattern(first + i, seed);
	return 0;
}

u64 user_check(const u64 *buffer, u64 words, u64 first, u64 seed)
{
	for (u64 i = 0; i < words; i++)
		if (buffer[i] != pattern(first + i, seed))
			return i;
	return ~0ull;
}

u64 user_crc32(const u8 *data, u64 length)
{
	static u32 table[256];
	u32 crc = ~0u;

	if (!table[1])
		for (u32 i = 0; i < 256; i++) {
			u32 value = i;

			for (u32 bit = 0; bit < 8; bit++)
				value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
			table[i] = value;
		}
	for (u64 i = 0; i < length; i++)
		crc = table[(u8)(crc ^ data[i])] ^ crc >> 8;
	return (u32)~crc;
}

u64 user_zero(u64 *buffer, u64 words)
{
	for (volatile u64 *word = buffer; words; words--)
		*word++ = 0;
	return 0;
}

u64 user_is_zero(const u64 *buffer, u64 words)
{
	for (u64 i = 0; i < words; i++)
		if (buffer[i])
			return i;
	return ~0ull;
}

u64 user_sort(u64 *values, u64 count)
{
	for (u64 gap = count / 2; gap; gap /= 2)
		for (u64 i = gap; i < count; i++)
			for (u64 j = i; j >= gap && values[j - gap] > values[j]; j -= gap) {
				u64 other = values[j];

				values[j] = values[j - gap];
				values[j - gap] = other;
			}
	return 0;
}

u64 user_spin(u64 rounds)
{
	u64 sum = 0;

	for (u64 i = 0; i < rounds; i++) {
		sum += i * i;
		asm volatile("" : "+r"(sum));
	}
	return sum;
}
