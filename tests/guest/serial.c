// The first 16550, and text: output is written in bursts of the FIFO's depth, input by IRQ 4.
#include "guest.h"

#define COM1 0x3f8
#define COM1_GSI 4
#define FIFO 16
#define LSR_DATA 0x01
#define LSR_EMPTY 0x20

static u32 room; // bytes that fit into the FIFO without asking
static volatile u32 input_head, input_tail;
static u8 input[1024];

void serial_init(void)
{
	outb(COM1 + 2, 0x07); // FIFOs on and empty
	outb(COM1 + 3, 0x03); // 8 bits, no parity
	outb(COM1 + 4, 0x0b); // DTR, RTS, interrupts out
}

static void put(u8 byte)
{
	if (!room) {
		while (!(inb(COM1 + 5) & LSR_EMPTY))
			;
		room = FIFO;
	}
	outb(COM1, byte);
	room--;
}

static void drain(u32 vector)
{
	while (inb(COM1 + 5) & LSR_DATA) {
		u8 byte = inb(COM1);

		if (input_head - input_tail < ARRAY_SIZE(input))
			input[input_head++ % ARRAY_SIZE(input)] = byte;
	}
}

void serial_enable_input(void)
{
	gsi_enable(COM1_GSI, drain);
	outb(COM1 + 1, 0x01);
	asm volatile("cli");
	drain(0);
	asm volatile("sti");
}

int serial_get(void)
{
	if (input_head == input_tail)
		return -1;
	return input[input_tail++ % ARRAY_SIZE(input)];
}

static void put_number(u64 value, u32 base)
{
	char digits[20];
	u32 count = 0;

	do {
		u32 digit = value % base;

		digits[count++] = (char)(digit < 10 ? '0' + digit : 'a' + digit - 10);
		value /= base;
	} while (value);
	while (count)
		put((u8)digits[--count]);
}

void print(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	for (; *format; format++) {
		if (*format != '%') {
			put((u8)*format);
			continue;
		}
		switch (*++format) {
		case 's':
			for (const char *text = va_arg(list, const char *); *text; text++)
				put((u8)*text);
			break;
		case 'c':
			put((u8)va_arg(list, int));
			break;
		case 'u':
			put_number(va_arg(list, u64), 10);
			break;
		case 'x':
			put_number(va_arg(list, u64), 16);
			break;
		default:
			put('%');
		}
	}
	va_end(list);
}

u64 parse_number(const char *text, const char **end)
{
	u64 value = 0;
	u32 base = 10;

	if (text[0] == '0' && text[1] == 'x') {
		base = 16;
		text += 2;
	}
	for (;; text++) {
		u32 digit = base;

		if (*text >= '0' && *text <= '9')
			digit = (u32)(*text - '0');
		else if (*text >= 'a' && *text <= 'f')
			digit = (u32)(*text - 'a' + 10);
		if (digit >= base)
			break;
		value = value * base + digit;
	}
	if (end)
		*end = text;
	return value;
}

int compare(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return (u8)*a - (u8)*b;
}

bool starts_with(const char *text, const char *prefix)
{
	while (*prefix)
		if (*text++ != *prefix++)
			return false;
	return true;
}
