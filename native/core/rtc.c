// The clock of an MC146818 RTC, read-only, in UTC: no alarm, no interrupt, no memory.
//
// A kernel without ACPI can't be told that there is no RTC; it then waits a second each time it
// finds the update bit of an absent one set, and has no time of day without kvmclock.
#include "core/core.h"

#include <time.h>

enum {
	RTC_SECONDS = 0x00,
	RTC_MINUTES = 0x02,
	RTC_HOURS = 0x04,
	RTC_WEEKDAY = 0x06,
	RTC_DAY = 0x07,
	RTC_MONTH = 0x08,
	RTC_YEAR = 0x09,
	RTC_A = 0x0a, // update in progress, divider
	RTC_B = 0x0b,
	RTC_D = 0x0d,
	RTC_CENTURY = 0x32,
	A_DIVIDER = 0x26, // 32768 Hz, 1024 Hz periodic; no update in progress
	B_24_HOURS = 0x02,
	D_VALID = 0x80,
};

static uint8_t bcd(int value)
{
	return (uint8_t)(value / 10 % 10 << 4 | value % 10);
}

uint8_t sv_rtc_read(uint8_t index)
{
	time_t now = time(NULL);
	struct tm utc;

	gmtime_r(&now, &utc);
	switch (index & 0x7f) { // bit 7 masks the NMI
	case RTC_SECONDS: return bcd(utc.tm_sec);
	case RTC_MINUTES: return bcd(utc.tm_min);
	case RTC_HOURS: return bcd(utc.tm_hour);
	case RTC_WEEKDAY: return bcd(utc.tm_wday + 1);
	case RTC_DAY: return bcd(utc.tm_mday);
	case RTC_MONTH: return bcd(utc.tm_mon + 1);
	case RTC_YEAR: return bcd(utc.tm_year % 100);
	case RTC_CENTURY: return bcd((utc.tm_year + 1900) / 100);
	case RTC_A: return A_DIVIDER;
	case RTC_B: return B_24_HOURS;
	case RTC_D: return D_VALID;
	default: return 0;
	}
}
