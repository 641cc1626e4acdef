// Package schedule says when schedules run and what their retention keeps. It
// computes: it has no clock, starts nothing and deletes nothing.
//
// # Times
//
// A Timing (plain, or a cron expression) names wall times in a time zone; Rule
// finds the instants that they stand for. Where clocks change:
//
//   - a wall time that does not exist runs at the first instant after the gap,
//     once, however many of the schedule's times fall into the gap;
//   - a wall time that exists twice runs once, at its first;
//   - but a schedule that runs in every hour of the day (hourly, or a cron
//     expression that names all hours) runs in both passes of the hour that is
//     there twice: it would else stand still for an hour.
//
// A year in which clocks change so has no gap longer than the schedule's own
// period plus the change, and no instant twice.
//
// # Being late
//
// Due compares the clock with the last time that was dealt with. What it finds
// overdue, after a stop or a jump of the clock, is caught up by one run or let
// go, as the schedule's policy says. A clock that was set back makes no time
// run again.
//
// # Concurrency
//
// Everything here is a value or immutable, and safe for concurrent use.
package schedule
